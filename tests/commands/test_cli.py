"""The commands as users run them: fit on two processes, resume, validate, export, verify, and what is refused."""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.checkpoints.run_files import client_state
from src.cli import main
from tests.checkpoints.tiny import dequantised, stored
from tests.command import Command, run, start_afresh
from tests.test_pages import pasted, shape


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of the loggers are as before: `main` puts its own there, which write into other tests' output."""
    loggers = [logging.getLogger(name) for name in ("src", "lightning.pytorch", "lightning.fabric")]
    before = [(logger, logger.handlers[:], logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)


def fit_args(inputs: Path, root: Path, *more: str) -> list[str]:
    return [
        "fit",
        "--config=configs/tiny_cpu.yaml",
        f"--trainer.default_root_dir={root}",
        "--trainer.enable_progress_bar=false",
        f"--model.pretrained={inputs}/model",
        f"--data.tokenizer={inputs}/model",
        f"--data.train_files=[{inputs}/train.jsonl]",
        f"--data.val_files=[{inputs}/val.jsonl]",
        f"--data.cache_dir={inputs}/cache",
        "--data.max_length=256",
        "--data.num_workers=0",
        "--trainer.accumulate_grad_batches=2",
        "--model.router_bias_update_speed=0.01",
        "--checkpoint.every_n_train_steps=3",
        "--checkpoint.keep=2",
        *more,
    ]


def scalars(root: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    as_a_callback = [
        "--trainer.callbacks+=src.callbacks.export_at_end.ExportAtEnd",
        f"--trainer.callbacks.out={root}/fp8",
        "--trainer.callbacks.dtype=fp8",
    ]
    start_afresh(*fit_args(inputs, root, f"--export.out={root}/hf", "--export.dtype=fp32", *as_a_callback))
    return root


SHARED = "--trainer.strategy.init_args.expert_parallel_size=2"


def test_fit_leaves_its_newest_checkpoints_and_curves(trained: Path) -> None:
    losses = scalars(trained, "train/loss")
    steps = len(losses)
    assert steps >= 6 and min(losses.values()) < losses[1]
    for tag in ("train/loss", "train/tokens_per_second", "lr-AdamW/pg1"):
        assert list(scalars(trained, tag)) == list(range(1, steps + 1)), tag
    assert max(scalars(trained, "val/loss")) == steps
    folder = trained / "checkpoints"
    names = sorted(p.name for p in folder.iterdir())
    assert (folder / "last.ckpt").is_symlink() and os.readlink(folder / "last.ckpt") == f"step={steps}.ckpt"
    assert len(names) == 3 and f"step={steps}.ckpt" in names
    for tag in (
        "train/grad_norm",
        "train/tokens_per_second",
        "train/mtp_loss",
        "val/loss",
        "val/accuracy",
        "val/perplexity",
    ):
        assert scalars(trained, tag), tag
    rates = scalars(trained, "lr-AdamW/pg1")
    assert rates[1] == pytest.approx(3e-3)


def test_the_checkpoint_tells_what_made_it(trained: Path, inputs: Path) -> None:
    last = trained / "checkpoints/last.ckpt"
    config = yaml.safe_load((last / "config.yaml").read_text())
    assert config["data"]["max_length"] == 256 and config["model"]["from_scratch"] is True
    record = json.loads((last / "run.json").read_text())
    assert record["base"] == str(inputs / "model") and record["versions"]["torch"] == torch.__version__
    assert {name: len(facts["hash"]) for name, facts in record["data"].items()} == {"train": 32, "val": 32}
    curve, noted = scalars(trained, "train/loss"), record["losses"]["train/loss"]
    # A save in the middle of training comes before its own step's loss is logged.
    assert record["step"] == len(curve) and noted["step"] in (len(curve) - 1, len(curve))
    assert noted["value"] == pytest.approx(curve[noted["step"]], rel=1e-6)
    assert record["tokens"] > 0
    assert (last / "hf/tokenizer.json").is_file() and (last / "hf/generation_config.json").is_file()


def test_a_killed_run_resumes_bit_for_bit(trained: Path, inputs: Path, tmp_path: Path) -> None:
    """Killed after its checkpoint in the middle of the first epoch; the weights it began with are not read again."""
    reached = tmp_path / "reached"
    pause = ["--trainer.callbacks+=tests.launch.pause.Pause", "--trainer.callbacks.step=4"]
    command = Command(*fit_args(inputs, tmp_path, *pause, f"--trainer.callbacks.reached={reached}"), ranks=2)
    while not (reached.exists() and (tmp_path / "checkpoints/last.ckpt").exists()):
        assert command.running(), command.output("stderr")[-3000:]
        time.sleep(0.02)
    command.kill()
    assert os.readlink(tmp_path / "checkpoints/last.ckpt") == "step=3.ckpt"
    result = run(*fit_args(inputs, tmp_path, "--ckpt_path=last"), ranks=2)
    assert "Loading weights" not in result.stderr and "Random weights" not in result.stderr
    losses, whole = scalars(tmp_path, "train/loss"), scalars(trained, "train/loss")
    # The killed process may not have written its last values; what was written and what followed are the same bits.
    assert losses.keys() >= set(range(4, len(whole) + 1))
    assert losses == {step: whole[step] for step in losses}
    assert scalars(tmp_path, "val/loss") == scalars(trained, "val/loss")


def test_a_run_resumes_on_other_layouts(trained: Path, inputs: Path, tmp_path: Path) -> None:
    """From 1x2 to 2x1 with shared experts, refused until the accumulation is halved, and from there to one process."""
    oldest = min(trained.glob("checkpoints/step=*.ckpt"), key=lambda p: int(p.stem.removeprefix("step=")))
    steps = int(oldest.stem.removeprefix("step="))
    sp = "--trainer.strategy.init_args.sequence_parallel_size=1"
    changed = fit_args(inputs, tmp_path / "2x1", f"--ckpt_path={oldest}", sp, SHARED)
    refused = run(*changed, ranks=2, check=False)
    assert refused.returncode != 0 and "set --trainer.accumulate_grad_batches 1" in refused.stderr
    often = ["--checkpoint.every_n_train_steps=1", "--checkpoint.keep=9"]
    run(*changed, "--trainer.accumulate_grad_batches=1", *often, ranks=2)
    between = tmp_path / f"2x1/checkpoints/step={steps + 1}.ckpt"
    run(*fit_args(inputs, tmp_path / "1x1", f"--ckpt_path={between}", sp, "--trainer.devices=1"))
    for tag in ("train/loss", "train/grad_norm", "lr-AdamW/pg1", "val/loss"):
        whole = scalars(trained, tag)
        for folder, first in (("2x1", steps), ("1x1", steps + 1)):
            expected = {step: value for step, value in whole.items() if step > first}
            assert scalars(tmp_path / folder, tag) == pytest.approx(expected, rel=1e-5), (folder, tag)


def test_validate_prints_the_loss_of_the_checkpoint(trained: Path, inputs: Path) -> None:
    no_training_data = "--data.train_files=[/nowhere.jsonl]"  # none is needed
    again = f"--data.val_sets={{again: [{inputs}/val.jsonl]}}"  # which leaves the mean of all as it was
    alone = ["--trainer.devices=1", "--trainer.strategy.init_args.sequence_parallel_size=1"]
    args = ["validate", *fit_args(inputs, trained)[1:], no_training_data, again, "--ckpt_path=last", *alone]
    args, recorded = [a for a in args if not a.startswith("--trainer.accumulate")], scalars(trained, "val/loss")
    for result in (start_afresh(*args), run(*args, "--trainer.devices=2", SHARED, ranks=2)):
        (loss, of_all), (of_set, its_loss) = (line.split() for line in result.stdout.splitlines()[-2:])
        assert (loss, of_set) == ("val/loss", "val/again/loss")
        printed = "\n".join(result.stdout.splitlines()[-2:]).replace("again", "math")
        assert shape(printed) == shape(pasted("docs/data.md", "val/loss"))[:2]
        assert [float(of_all), float(its_loss)] == pytest.approx([recorded[max(recorded)]] * 2, rel=1e-6)


class _Payload:
    """Unpickled freely it makes a directory."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def test_a_checkpoint_runs_no_code(trained: Path, inputs: Path, tmp_path: Path) -> None:
    copy, marker = tmp_path / "run/checkpoints/step=1.ckpt", tmp_path / "ran"
    shutil.copytree((trained / "checkpoints/last.ckpt").resolve(), copy)
    for file in (copy / "checkpoint").glob("*pp_rank_0_mp_rank_00_model_states.pt"):
        state = client_state(copy)  # mapped from the file
        file.unlink()
        torch.save(state | {"callbacks": {"Payload": _Payload(str(marker))}}, file)
    (copy / "manifest.json").unlink()
    for command in ("fit", "validate"):
        args = [*fit_args(inputs, tmp_path / "run")[1:], f"--ckpt_path={copy}"]
        one = ["--trainer.devices=1", "--trainer.strategy.init_args.sequence_parallel_size=1"]
        one.append("--trainer.accumulate_grad_batches=4")
        refused = run(command, *args, *one, check=False)
        assert refused.returncode == 2 and "if you trust it, --accept_unlisted true" in refused.stderr
        result = run(command, *args, *one, "--accept_unlisted=true", check=False)
        assert result.returncode == 2 and "holds an object that is not loaded for safety" in result.stderr
        assert "Traceback" not in result.stderr and not marker.exists()


def test_validate_takes_an_export_in_the_dtype_that_it_has(trained: Path, inputs: Path, tmp_path: Path) -> None:
    """In fp32: the masters' loss is that of the checkpoint, FP8's that of its values, dequantised block by block."""
    plain = tmp_path / "plain"
    shutil.copytree(trained / "fp8", plain, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(
        {name: t.float() for name, t in dequantised(stored(trained / "fp8")).items()}, plain / "model.safetensors"
    )
    losses = {}
    for directory, precision in ((trained / "hf", 32), (trained / "fp8", 32), (plain, 32), (trained / "fp8", "bf16")):
        args = fit_args(inputs, tmp_path, f"--model.pretrained={directory}", "--model.from_scratch=false")
        args += ["--trainer.devices=1", "--trainer.strategy.init_args.sequence_parallel_size=1"]
        args += [f"--trainer.precision={precision}-true"]
        result = run("validate", *[arg for arg in args[1:] if not arg.startswith("--trainer.accumulate")])
        losses[directory.name, precision] = float(result.stdout.split()[-1])
        said = "are FP8 and are rounded to bf16 here; --trainer.precision 32-true" in result.stderr
        assert said == (precision == "bf16")
    recorded = scalars(trained, "val/loss")
    assert losses["hf", 32] == pytest.approx(recorded[max(recorded)], rel=1e-6)
    assert losses["fp8", 32] == losses["plain", 32] != losses["hf", 32]
    assert losses["fp8", "bf16"] != losses["fp8", 32] == pytest.approx(losses["fp8", "bf16"], rel=1e-2)


def test_export_loads_in_transformers(trained: Path, tmp_path: Path) -> None:
    start_afresh("export", f"--ckpt={trained}/checkpoints/last.ckpt", f"--out={tmp_path}/hf", "--dtype=fp32")
    for file in (tmp_path / "hf").iterdir():  # the same as at the end of fit, from the live partitions
        if file.name != "README.md":  # which knows the losses of the last step, logged after the last save
            assert file.read_bytes() == (trained / "hf" / file.name).read_bytes(), file.name
    assert f"| optimizer steps | {len(scalars(trained, 'train/loss'))} |" in (trained / "hf/README.md").read_text()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    block = "model.layers.2."  # the multi-token prediction, which transformers expects at 61 alone
    unexpected = {name for name in info["unexpected_keys"] if not name.startswith(block)}
    assert not unexpected and not info["missing_keys"] and not info["mismatched_keys"]
    assert {name for name in info["unexpected_keys"] if name.endswith("eh_proj.weight")} == {f"{block}eh_proj.weight"}
    biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    assert biases and all(b.any() and torch.allclose(100 * b, (100 * b).round(), atol=1e-4) for b in biases.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template and model.generation_config.eos_token_id == 1
    result = start_afresh("verify", f"--model={tmp_path}/hf")
    assert result.stdout.count(" ok") == 3


def test_switches_stand_alone(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", f"--model={trained}/fp8", "--layout-only"])  # exported by the callback of the config
    assert "the layout of published DeepSeek-V3 weights in FP8" in capsys.readouterr().out
    last = trained / "checkpoints/last.ckpt"
    main(["export", f"--ckpt={last}", f"--out={trained}/hf", "--dtype=fp32", "--resume"])  # nothing is left to do
    shutil.copytree(trained / "hf", tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json or tiktoken.model: missing"):
        main(["verify", "--layout-only", f"--model={tmp_path}/hf"])


def test_a_second_fit_into_the_folder_is_refused(trained: Path, inputs: Path) -> None:
    result = run(*fit_args(inputs, trained), check=False)
    assert result.returncode != 0 and "holds checkpoints of an earlier run" in result.stderr
    assert "Traceback" not in result.stderr and "error: " in result.stderr
    assert "--ckpt_path last" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--ckpt_path=last"], "there is no checkpoint"),
        (["--data.max_length=8192"], "above the model's max_position_embeddings 4096"),
        (["--trainer.strategy.init_args.sequence_parallel_size=3"], "WORLD_SIZE 2"),
        (["--model.pretrained=/nowhere"], "/nowhere/config.json does not exist"),
        (["--model.experts_per_shard=3"], "does not divide the 8 experts"),
        (["--model.from_scratch=false"], "holds no weights (*.safetensors): give the model's directory with"),
        (["--data.train_files=[/nowhere/*.jsonl]"], "/nowhere/*.jsonl"),
    ],
)
def test_what_cannot_work_is_refused(change: list[str], message: str, inputs: Path, tmp_path: Path) -> None:
    result = run(*fit_args(inputs, tmp_path, *change), ranks=2, check=False)
    assert result.returncode != 0 and message in result.stderr


def test_an_older_checkpoint_than_the_newest_is_not_resumed_from(trained: Path, inputs: Path) -> None:
    folder = trained / "checkpoints"
    oldest = min((p for p in folder.glob("step=*.ckpt")), key=lambda p: int(p.stem.removeprefix("step=")))
    result = run(*fit_args(inputs, trained, f"--ckpt_path={oldest}"), check=False)
    assert result.returncode != 0 and "is older than step=" in result.stderr


@pytest.mark.parametrize("given", [None, "backend:native"])
def test_segments_of_gpu_memory_grow_unless_something_else_is_set(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given or "")
    if given is None:
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == (given or "expandable_segments:True")


@pytest.mark.parametrize("args", [[], ["fly"]])
def test_what_is_no_command_shows_the_usage(args: list[str]) -> None:
    result = start_afresh(*args, check=False)  # at once, since nothing heavy is imported
    assert result.returncode != 0 and "usage: python -m src.cli" in result.stdout


@pytest.mark.parametrize("command", ["export", "verify"])
def test_help_needs_no_files(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0 and "--" in result.stdout
