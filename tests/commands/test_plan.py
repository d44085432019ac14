"""The command: verdicts, exit codes, JSON, files, and errors."""

import json
from collections import Counter
from pathlib import Path

import pytest

from src.commands.plan import PlanCLI, plan_file, verdict
from src.commands.planned import host_memory
from src.planner.cluster import Cluster
from src.planner.plan import make_plan
from src.planner.report import digits, search_text
from src.planner.search import nearest, pays_until, scale, search
from tests.command import run
from tests.planner.settings import ROWS, guide, sizes

CONFIG = "configs/32n_sp4.yaml"
FITS = ["--config", CONFIG]
TOO_LARGE = [*FITS, "--trainer.strategy.init_args.sequence_parallel_size", "1"]  # 65,536 tokens a GPU


def test_a_run_that_fits_is_told_with_its_formulas_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "picture.png"
    files = ["--trace", str(trace)]
    try:
        import matplotlib  # noqa: F401

        files += ["--picture", str(picture)]
    except ImportError:
        pass
    PlanCLI([*FITS, "--explain", *files])
    shown = capsys.readouterr().out
    assert "data/train.jsonl not here; assumed: 100,000 full rows" in shown
    assert "= 682.636e9 parameters / 256 ranks x 2 bytes" in shown
    assert "196 steps" in shown and "Assumed (measure with `preflight --write F`" in shown
    assert shown.strip().splitlines()[-1].startswith("fits: ") and "Limited by: ZeRO's network" in shown
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) > 3000 and all(event["dur"] > 0 for event in spans)
    assert any(event["name"] == "layer 60 shard 7 backward" for event in spans)
    assert "--picture" not in files or picture.stat().st_size > 10_000


def test_a_run_that_does_not_fit_exits_with_1_and_names_the_nearest_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        PlanCLI([*TOO_LARGE, "--json"])
    assert stop.value.code == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is False and "layer inputs" in answer["binding"]
    assert answer["device"]["bytes"] > answer["device"]["room"]
    assert {line["name"] for line in answer["device"]["lines"]} >= {"gathered weights", "layer inputs", "NCCL"}
    assert answer["nearest"]["verdict"].startswith("fits: ")
    change = answer["nearest"]["change"].split()
    PlanCLI([*TOO_LARGE, *change])  # the suggestion is a command line, and true
    assert answer["nearest"]["verdict"].split(",")[0] in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "steps"), [("0.5", 98), ("8", 2), ("1000000", 196)])
def test_an_epoch_is_as_long_as_the_trainer_lets_it(limit: str, steps: int) -> None:
    plan = plan_file(CONFIG, "--trainer.limit_train_batches", limit)
    assert plan.steps == steps and ("limit_train_batches" in plan.data.source) == (steps < 196)


def test_json_has_what_a_script_asks_for(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("nics_per_node: 1\nnic_gbit: 400\n")
    arguments = ["--json", "--cluster", str(cluster), "--trainer.max_steps", "7", "--document_length", "4096"]
    answer = json.loads(run("plan", *FITS, *arguments).stdout)
    assert set(answer) == {
        *("fits", "verdict", "binding", "device", "host", "disk", "time", "tokens_per_s_per_gpu"),
        *("tokens_per_s_per_gpu_range", "mfu", "network_bytes", "steps", "rows_per_step", "data", "cluster", "assumed"),
        "unwritable",
    }
    assert answer["steps"] == 7 and answer["rows_per_step"] == 512
    assert "nics_per_node" not in answer["assumed"] and "pcie_in_gb_s" in answer["assumed"]
    assert answer["time"]["micro_step_s"] > 100  # one network card a node
    low, high = answer["tokens_per_s_per_gpu_range"]
    assert low < answer["tokens_per_s_per_gpu"] < high


def test_auto_is_the_kernel_that_the_card_can_run(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    for gpu, kernel in (
        ("NVIDIA A100-SXM4-80GB", "varlen"),
        ("NVIDIA B200", "varlen"),
        ("NVIDIA H200", "flash_attn_4"),
    ):
        cluster.write_text(f"gpu: {gpu}\n")
        assert plan_file(CONFIG, "--cluster", str(cluster)).settings.attention_kernel == kernel


def test_data_that_is_there_is_counted(tmp_path: Path) -> None:
    arguments = ["--data.train_files", "[data/demo/train.jsonl]", "--data.cache_dir", str(tmp_path)]
    command = PlanCLI(["--config", "configs/1gpu_small.yaml", *arguments])
    assert 0 < command.plan.data.tokens < command.plan.data.rows * 4096
    assert command.plan.settings.document < 4096  # chats, not whole rows
    assert command.plan.steps == -(-command.plan.data.rows // 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cluster", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--trainer.strategy.init_args.sequence_parallel_size", "3"], "not a multiple of sequence_parallel_size 3"),
        (["--model.experts_per_shard", "24"], "experts_per_shard 24 does not divide the 256 experts"),
        (
            ["--trainer.strategy.stage=2", "--trainer.strategy.offload_parameters=true"],
            "offload_parameters needs ZeRO stage 3, stage is 2: set one",
        ),
        (["--model.pretrained", "configs"], "configs/config.json does not exist"),
        (["--data.batch_size", "0"], "data.batch_size is 0; it must be in [1, 65536]"),
        (["--trainer.accumulate_grad_batches", "-1"], "trainer.accumulate_grad_batches is -1"),
        (["--trainer.strategy.init_args.sequence_parallel_size", "0"], "sequence_parallel_size is 0"),
        (["--trainer.strategy.init_args.offload_optimizer_device", "nvme"], "offload_optimizer_device is 'nvme': plan"),
        (["--document_length", "0"], "document_length is 0"),
        (["--trace", "nowhere/t.json"], "--trace nowhere/t.json cannot be written: No such file"),
        (["--trace", "/proc/t.json"], "--trace /proc/t.json cannot be written: "),
        (["--picture", "picture.xyz"], "picture.xyz has another suffix; use one of .png, "),
    ],
)
def test_a_wrong_question_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        PlanCLI([*FITS, *arguments])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_the_verdict_is_one_line() -> None:
    assert verdict(CONFIG).startswith("fits: ") and "\n" not in verdict(CONFIG)
    arguments = TOO_LARGE[2:]
    assert verdict(CONFIG, *arguments).startswith("does not fit: GPU memory")
    assert verdict("configs/tiny_cpu.yaml").startswith("CPU: ")


def test_what_the_search_finds_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = guide(sizes=sizes(mtp=True), sp=1, batch_size=1)
    monkeypatch.setattr(
        "src.planner.search.candidates",
        lambda s, nodes: [s, s.but(batch_size=4), s.but(attention_output="offload")],
    )
    found = search(settings, Cluster(), ROWS, best=4)
    assert len(found) >= 2 and all(plan.fits for plan in found)
    assert found[0].settings.halves and {plan.settings.halves for plan in found} == {False, True}
    assert [plan.rate() for plan in found] == sorted((plan.rate() for plan in found), reverse=True)
    assert all(make_plan(plan.settings, Cluster(), ROWS).fits for plan in found)


def test_the_grid_keeps_the_rows_of_a_step_and_is_valid() -> None:
    from src.planner.search import candidates

    grid = candidates(guide(sp=4, batch_size=2))
    assert len(set(grid)) == len(grid) > 100
    assert {settings.sp for settings in grid} == {1, 2, 4, 8}
    assert {settings.nodes for settings in grid} == {32}  # those that are asked for
    assert {settings.nodes for settings in candidates(guide(sp=4, batch_size=2), [16, 64])} == {16, 64}
    assert all(256 <= settings.rows_per_step <= 1024 for settings in grid)
    assert Counter(settings.ep for settings in grid) == {1: len(grid) // 2, 8: len(grid) // 2}
    assert {settings.ep for settings in candidates(guide(ep=4))} == {1, 4, 8}
    assert {settings.ep for settings in candidates(guide(gpus=6))} == {1}  # 6 do not divide 256 experts
    assert {(settings.ep, settings.offload_parameters) for settings in candidates(guide(stage=2))} == {(1, False)}


@pytest.mark.parametrize(
    ("config", "step"),
    [
        ([CONFIG], 173),
        (["configs/1n_moonlight.yaml"], 79),  # shards of 64 experts, of 8 where eight GPUs share them
        (["configs/1n_moonlight.yaml", "--trainer.strategy.expert_parallel_size=8"], 97),
    ],
)
def test_what_the_search_prints_can_be_pasted(config: list[str], step: int) -> None:
    """Each line of arguments makes the config the settings that it stands for; read by the command itself."""
    from src.planner.search import candidates

    plan = plan_file(*config)
    asked = plan.settings
    chosen = candidates(asked, [asked.nodes, 16])[::step]
    assert {settings.ep for settings in chosen} == {1, 8}
    for found in [*chosen, *(settings.but(reduce_dtype="bf16") for settings in chosen[:1])]:
        again = plan_file(*config, *found.arguments(asked).split()).settings
        assert again.sizes == found.sizes
        assert again.arguments(found) == "" and again.rows_per_step == found.rows_per_step
    assert asked.arguments(asked) == ""
    shown = search_text([plan], asked).splitlines()
    assert len(shown) == 3 and shown[-1] == "    (as asked)"


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (1e-17, "0"), (0.2143, "0.214"), (5.018, "5.02"), (31.08, "31.1"), (126.6, "127"), (1388.2, "1388")],
)
def test_small_numbers_keep_their_digits(number: float, shown: str) -> None:
    assert digits(number) == shown


def test_data_without_a_tokenizer_is_estimated_and_says_why() -> None:
    plan = PlanCLI([*FITS, "--data.train_files", "[data/demo/train.jsonl]"]).plan
    source = plan.data.source
    assert "no tokenizer.json in configs/models/deepseek-v3" in source and "one document each" in source
    size = Path("data/demo/train.jsonl").stat().st_size
    assert plan.data.tokens == int(size / 4.2) and plan.settings.document == 32768


def test_max_steps_alone_ends_a_run_of_unbounded_epochs() -> None:
    for epochs in ("null", "-1"):
        plan = PlanCLI([*FITS, "--trainer.max_steps", "5000", "--trainer.max_epochs", epochs]).plan
        assert plan.steps == 5000  # an epoch has 196


def test_weights_and_export_take_disk_and_what_is_not_counted_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--weights.every_n_train_steps", "10", "--weights.keep", "3", "--export.out", "x"]
    plan = PlanCLI([*FITS, *more, "--data.val_files", "[v.jsonl]"]).plan
    exported = 2 * plan.settings.sizes.parameters
    assert [line.nbytes for line in plan.disk[1:]] == [4 * exported, exported]
    assert "not counted in the run's time: validation, weights saves, the export" in capsys.readouterr().out
    assert len(PlanCLI(FITS).plan.disk) == 1


def test_the_nearest_keeps_the_rows_of_a_step_and_takes_the_fewest_nodes() -> None:
    full = guide(nodes=8, sp=8, batch_size=2, attention_output="offload", num_workers=4)
    found = nearest(full, Cluster(), ROWS)
    assert found is not None and found[0] == "--checkpoint.async_save false"
    found = nearest(full, Cluster(host_memory_gib=1450), ROWS)
    assert found is not None and found[0] == "--trainer.num_nodes 16 --trainer.accumulate_grad_batches 2"
    assert found[1].settings.rows_per_step == full.rows_per_step
    # A node that is too small for the copy that a save writes.
    found = nearest(guide(), Cluster(host_memory_gib=600), ROWS)
    assert found is not None and found[0] == "--checkpoint.async_save false"


def test_no_nearest_where_nothing_near_fits() -> None:
    assert nearest(guide(nodes=1, gpus=1, sp=1, offload_optimizer=False), Cluster(), ROWS) is None


def test_scale_tells_where_it_stops_paying() -> None:
    plans = scale(guide(sp=4, batch_size=2), Cluster(), ROWS)
    assert [plan.settings.world for plan in plans] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert not plans[0].fits  # 671e9 parameters on one node
    best = pays_until(plans)
    assert best is not None and best.fits


def test_fit_says_what_host_memory_comes_when() -> None:
    config = PlanCLI(["--config", "configs/32n_sp4.yaml"]).config
    said, too_much = host_memory(config, 1000 << 30)
    assert not too_much and "\n" not in said
    for part in ("states and gradient 318 GiB at the start", "pinned 360 GiB in the first micro-step", "1000 are free"):
        assert part in said
    assert "copy written by a save, pageable 238 GiB at the first save" in said
    assert host_memory(config, 900 << 30)[1]
