"""Config files over config files: what a file changes of the one that it names, however either is written."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.commands.config_files import read_config
from src.commands.training import TRAINER_DEFAULTS
from tests.command import ROOT, run
from tests.test_configs import CONFIGS, Parse, parsed

SHIPPED = ROOT / "configs/32n_sp4.yaml"


def write(path: Path, settings: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


NESTED = {
    "trainer": {"num_nodes": 16, "strategy": {"init_args": {"reduce_bucket_size": 1000}}},
    "model": {"pretrained": "DIR", "freeze": ["model.embed*"]},
    "data": {"train_files": ["mine.jsonl"]},
}
DOTTED = {
    "trainer.num_nodes": 16,
    "trainer.strategy.init_args.reduce_bucket_size": 1000,
    "model.pretrained": "DIR",
    "model.freeze": ["model.embed*"],
    "data.train_files": ["mine.jsonl"],
}
MIXED = {
    "trainer": {"num_nodes": 2, "strategy.init_args": {"reduce_bucket_size": 1000}},
    "trainer.num_nodes": 16,
    "model.pretrained": "DIR",
    "model": {"freeze": ["model.embed*"]},
    "data": {"train_files": ["mine.jsonl"]},
}


@pytest.mark.parametrize("settings", [NESTED, DOTTED, MIXED], ids=["nested", "dotted", "mixed"])
@pytest.mark.parametrize("key", ["first", "last"])
def test_what_a_file_does_not_say_stays_as_the_named_file_says(
    settings: dict[str, Any], key: str, tmp_path: Path
) -> None:
    base = parsed(SHIPPED)
    named = {"config": str(SHIPPED)}
    found = parsed(write(tmp_path / "mine.yaml", named | settings if key == "first" else settings | named))
    expected = base | {name: dict(base[name]) for name in ("trainer", "model", "data")}
    expected["trainer"]["strategy"]["init_args"]["reduce_bucket_size"] = 1000
    expected["trainer"]["num_nodes"] = 16
    expected["model"] |= {"pretrained": "DIR", "freeze": ["model.embed*"]}
    expected["data"]["train_files"] = ["mine.jsonl"]
    assert {**found, "config": None} == {**expected, "config": None}
    assert found["model"]["learning_rate"] == 2e-7 and found["data"]["batch_size"] == 2
    by_hand = Parse(["--config", str(SHIPPED), "--config", str(write(tmp_path / "two.yaml", settings))]).config
    assert {**by_hand.as_dict(), "config": None} == {**expected, "config": None}


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    write(tmp_path / "shared.yaml", {"data.seed": 1, "data.num_workers": 7})
    write(tmp_path / "sub/more.yaml", {"data.seed": 2, "config": "../shared.yaml"})
    mine = write(tmp_path / "sub/mine.yaml", {"config": ["more.yaml", "../shared.yaml"], "data": {"batch_size": 3}})
    assert read_config(mine) == {"data": {"seed": 1, "num_workers": 7, "batch_size": 3}}  # the later of two wins


def test_lists_are_replaced_and_a_plus_appends(tmp_path: Path) -> None:
    one, two = ({"class_path": name} for name in ("LearningRateMonitor", "DeviceStatsMonitor"))
    base = write(tmp_path / "base.yaml", {"trainer.callbacks": [one], "model.betas": [0.9, 0.95]})
    for settings, callbacks in (
        ({"trainer": {"callbacks": [two]}}, [two]),
        ({"trainer.callbacks+": [two]}, [one, two]),
        ({"trainer": {"callbacks+": two}}, [one, two]),
    ):
        mine = write(tmp_path / "mine.yaml", {"config": base.name, **settings})
        assert read_config(mine) == {"trainer": {"callbacks": callbacks}, "model": {"betas": [0.9, 0.95]}}


def test_another_class_starts_from_its_own_defaults(tmp_path: Path) -> None:
    """`name` is an argument that both classes have."""
    base = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "here", "name": "theirs"}}
    other = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "there"}}
    first = write(tmp_path / "first.yaml", {"config": str(SHIPPED), "trainer": {"logger": base}})
    mine = write(tmp_path / "mine.yaml", {"trainer": {"logger": other}, "config": "first.yaml"})
    for args in ([mine], [first, write(tmp_path / "two.yaml", {"trainer": {"logger": other}})]):
        logger = Parse([word for path in args for word in ("--config", str(path))]).config.trainer.logger
        assert logger.class_path.endswith(".CSVLogger")
        assert logger.init_args.save_dir == "there" and logger.init_args.name == "lightning_logs"
    same = {"class_path": "src.strategies.deepspeed_sp.DeepSpeedSPStrategy", "init_args": {"stage": 2}}
    write(mine, {"trainer": {"strategy": same}, "config": str(SHIPPED)})
    options = parsed(mine)["trainer"]["strategy"]["init_args"]
    assert (options["sequence_parallel_size"], options["stage"]) == (4, 2)


def test_a_file_of_its_own_gets_what_every_run_needs(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", {"model": {"pretrained": "DIR"}, "data": {"train_files": ["mine.jsonl"]}})
    config = parsed(mine)
    trainer = config["trainer"]
    assert (trainer["max_epochs"], trainer["gradient_clip_val"], trainer["log_every_n_steps"]) == (1, 1.0, 1)
    assert (trainer["precision"], trainer["num_sanity_val_steps"]) == ("bf16-true", 0)
    assert trainer["strategy"]["class_path"] == "src.strategies.DeepSpeedSPStrategy"
    assert trainer["strategy"]["init_args"]["stage"] == 3 and config["seed_everything"] == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"mine": "config: other.yaml"}, r"other\.yaml cannot be read.*mine\.yaml names it.*relative to its folder"),
        ({"mine": "config: b.yaml", "b": "config: mine.yaml"}, r"names itself: config: b\.yaml -> config: mine\.yaml"),
        ({"mine": "config: {a: 1}"}, r"config is \{'a': 1\}; it must be the path of a file"),
        ({"mine": "- 1"}, r"mine\.yaml holds list; it must be a mapping"),
        ({"mine": "a: [1"}, r"mine\.yaml is not valid YAML: .*line 1"),
    ],
)
def test_what_cannot_be_read_is_named(
    files: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(SystemExit):
        Parse(["--config", str(tmp_path / "mine.yaml")])
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_what_is_printed_reads_back_as_it_was(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        Parse(["--print_config", "--config", str(path)])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert {**parsed(tmp_path / "printed.yaml"), "config": None} == {**parsed(path), "config": None}


def test_every_command_reads_what_one_prints(tmp_path: Path) -> None:
    """Where fit's own option stands first, and plan's are left out."""
    asked = ("--config", str(SHIPPED), "--trainer.num_nodes=16")
    for command, options in (("plan", ["--explain"]), ("fit", []), ("validate", [])):
        (tmp_path / "printed.yaml").write_text(run(command, "--print_config", *asked, *options).stdout)
        for reader in ("plan", "check-data", "fit"):
            read = run(reader, "--config", str(tmp_path / "printed.yaml"), "--print_config").stdout
            settings = yaml.safe_load(read)
            assert settings["trainer"]["num_nodes"] == 16 and settings["model"]["learning_rate"] == 2e-7


def test_the_ten_lines_of_the_docs(tmp_path: Path) -> None:
    text = (ROOT / "docs/configs.md").read_text()
    lines = text.split("```yaml\n")[1].split("```")[0].replace("configs/", f"{ROOT}/configs/")
    (tmp_path / "mine.yaml").write_text(lines)
    config, base = parsed(tmp_path / "mine.yaml"), parsed(SHIPPED)
    assert len(lines.splitlines()) == 10
    assert config["model"] == base["model"] | {"pretrained": "/nfs/DeepSeek-V3", "learning_rate": 1e-6}
    assert config["trainer"] == base["trainer"] | {"num_nodes": 16, "default_root_dir": "runs/mine"}
    named = dict(re.findall(r"`(?:trainer\.)?(\w+)` ([\w.-]+)[,.]", text.split("Defaults that differ")[1]))
    assert named.keys() == TRAINER_DEFAULTS.keys()
    for name, value in TRAINER_DEFAULTS.items():
        written = str(value).lower() if isinstance(value, bool) else str(value)
        assert named[name].rstrip(".") == (value["class_path"] if name == "strategy" else written)


@pytest.mark.parametrize("name", ["src.strategies.DeepSpeedSPStrategy", "DeepSpeedSPStrategy"])
def test_the_strategy_may_be_named_as_text(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"config: {ROOT}/configs/tiny_cpu.yaml\ntrainer: {{strategy: {name}}}\n")
    expected = Parse(["--config", str(ROOT / "configs/tiny_cpu.yaml"), "--trainer.strategy.stage=1"]).config
    asked = ["--trainer.strategy", name, "--trainer.strategy.stage=1", f"--trainer.strategy={name}"]
    assert Parse(["--config", str(file), *asked]).config.trainer.strategy == expected.trainer.strategy
