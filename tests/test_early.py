"""What answers before the seconds of imports: --help and refusals, by a list that equals what the parsers have."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from src.commands.early import read
from src.commands.options import OWN, options_of
from tests.command import ROOT
from tests.test_configs import CONFIGS, Parse, parsed
from tests.test_pages import pasted

TINY = "configs/tiny_cpu.yaml"


def _maker() -> Any:
    spec = spec_from_file_location("make_options", ROOT / "scripts/make_options.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_list_and_full_config_are_what_the_parsers_have() -> None:
    """`python scripts/make_options.py` after a change of an option."""
    maker = _maker()
    found = maker.options()
    assert maker.LIST.read_text(encoding="utf-8") == maker.list_text(found)
    assert maker.FULL.read_text(encoding="utf-8") == maker.full_text(found["FIT"])


def test_the_full_config_is_that_of_the_defaults() -> None:
    needed = ["--model.pretrained=configs/models/deepseek-v3", "--data.train_files=[data/train.jsonl]"]
    full, defaults = parsed(ROOT / "configs/full.yaml"), Parse(needed).config.as_dict()
    for config in (full, defaults):
        config.pop("config")
    own = defaults["trainer"]["strategy"].pop("init_args", {})
    assert full["trainer"]["strategy"].pop("init_args") == own
    assert full == defaults


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_read_as_by_the_command_itself(path: Path) -> None:
    _, config = read("plan", ["--config", str(path), "--trainer.strategy.stage", "3", "--trainer.max_time=00:01:00:00"])
    assert config is not None
    ours, theirs = config.as_dict(), Parse(["--config", str(path), "--trainer.max_time=00:01:00:00"]).config.as_dict()
    for settings in (ours, theirs):
        settings.pop("config")
    for option in OWN["plan"]:
        ours.pop(option.name)
    assert ours == theirs


@pytest.mark.parametrize(
    "args",
    [
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=here"],
        ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=step"],
        ["--trainer.strategy={init_args: {stage: 2}}"],
        ["--trainer.profiler=SimpleProfiler"],
        ["--model={learning_rate: 1}"],
        ["--print_config"],
    ],
)
def test_what_needs_classes_is_left_to_the_command(args: list[str], tmp_path: Path) -> None:
    assert read("fit", ["--config", TINY, *args])[1] is None
    with pytest.raises(SystemExit):  # beside it what cannot be is refused all the same
        read("fit", ["--config", TINY, *args, "--model.learning_rate=fast"])


def test_classes_in_a_file_are_left_to_the_command(tmp_path: Path) -> None:
    logger = "{class_path: CSVLogger, init_args: {save_dir: here}}"
    callbacks = "[{class_path: LearningRateMonitor}]"
    (tmp_path / "a.yaml").write_text(f"config: {ROOT}/{TINY}\ntrainer: {{logger: {logger}, callbacks: {callbacks}}}\n")
    assert read("fit", ["--config", f"{tmp_path}/a.yaml"])[1] is None


def test_help_has_a_screen_of_the_most_used_and_all_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for args in (["--help"], ["--help", "all"], ["--help", "keep"]):
        with pytest.raises(SystemExit) as stop:
            read("fit", args)
        assert not stop.value.code
        texts.append(capsys.readouterr().out)
    screen, everything, some = texts
    assert len(screen.splitlines()) < 30 and max(map(len, screen.splitlines())) <= 120
    names = {option.name for option in options_of("fit")}
    assert {line[4:] for line in everything.splitlines() if line.startswith("  --")} == names
    assert "--checkpoint.keep" in some and "--weights.keep" in some and "learning_rate" not in some


def test_nothing_heavy_is_imported_for_help_refusals_and_a_plan() -> None:
    """In one process, each after the other."""
    told = [["fit", "--help"], ["export", "--help"], ["fit", "--config", TINY, "--model.learningrate=1"]]
    told += [["fit", "--config", TINY, "--model.learning_rate=9"], ["plan", "--config", "configs/32n_sp4.yaml"]]
    told += [["plan", "--config", TINY]]  # whose data is here: tokenised, or read from the cache
    program = f"""
import sys
from src.cli import main
for args in {told!r}:
    try:
        main(args)
    except SystemExit:
        pass
    print("loaded", args, sorted({{"torch", "lightning", "deepspeed"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    loaded = [line for line in result.stdout.splitlines() if line.startswith("loaded")]
    assert len(loaded) == len(told) and all(line.endswith(" []") for line in loaded), (loaded, result.stderr[-2000:])


def test_the_pages_wrong_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("model: {learningrate: 1.0e-6}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        read("plan", ["--config", "mine.yaml"])
    assert capsys.readouterr().err == pasted("docs/configs.md", "error: ").partition("\n")[2]


@pytest.mark.parametrize("args", ["--help", "fit --help all"])
def test_a_reader_that_ends_is_no_error(args: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m src.cli {args} | true"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
