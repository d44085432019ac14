"""Whatever is wrong with an option, one line says so: its place, its value, what it must be or which is meant."""

import re
from contextlib import suppress
from pathlib import Path

import pytest

from src.commands.early import read
from tests.command import ROOT, run
from tests.test_configs import Parse

TINY = str(ROOT / "configs/tiny_cpu.yaml")
# Any text is taken for these when arguments are read: paths and names that are looked at later.
TEXTS = {
    *("ckpt_path", "model.pretrained", "data.tokenizer", "data.cache_dir", "export.out", "stop.marker"),
    *("trainer.default_root_dir", "trainer.model_registry"),
    *(f"trainer.strategy.init_args.{name}" for name in ("config", "nvme_path")),
}
MINUS_ONE = {f"trainer.{name}" for name in ("devices", "max_epochs", "max_steps", "num_sanity_val_steps")}


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The command's own line, which is the same before its imports, unless a class among the settings has to say it."""
    with pytest.raises(SystemExit) as stop:
        Parse(args)
    (first,) = capsys.readouterr().err.splitlines()
    with suppress(SystemExit):
        assert read("fit", args)[1] is None
    again = capsys.readouterr().err.splitlines()
    of_a_class = re.search(r"strategy|callbacks|must be a mapping", first)
    assert stop.value.code == 2 and again == ([] if of_a_class else [first])
    return first.removeprefix("error: ")


@pytest.mark.parametrize("value", ["-1", "nan", "abc"])
def test_every_option_takes_a_senseless_value_in_one_line_or_not_at_all(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some 140 options, each with each of three values: no traceback, and none is accepted that means nothing."""
    command = Parse(["--config", TINY])
    options = [key for key, _ in command.config.items() if key != "config" and not key.endswith("class_path")]
    assert len(options) > 130
    taken = set()
    for option in options:
        try:
            command.parse_arguments(command.parser, ["--config", TINY, f"--{option}={value}"])
            taken.add(option)
        except SystemExit as stop:
            (line,) = capsys.readouterr().err.splitlines()
            assert stop.code == 2 and line.startswith("error: ") and option.split(".")[-1] in line, line
            assert len(line) < 400 and "<class" not in line and "typing." not in line, line
    assert taken == (TEXTS | MINUS_ONE if value == "-1" else TEXTS)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--model.learningrate=1e-4"], r"--model\.learningrate is not an option; did you mean --model\.learning_rate"),
        (["--model.learningrate", "1"], r"--model\.learningrate is not an option; did you mean --model\.learning_rate"),
        (["--modle.learning_rate=1"], r"--modle\.learning_rate is not an option; did you mean --model\.learning_rate"),
        (["--learning_rate=1"], r"--learning_rate is not an option; did you mean --model\.learning_rate"),
        (["--keep=1"], r"--keep is not an option; did you mean --checkpoint\.keep or --weights\.keep\?"),
        (["--zzz=1"], r"--zzz is not an option; --help lists them all\."),
        (["--trainer.strategy.stge=3"], r"--trainer\.strategy\.stge is .* mean --trainer\.strategy\.stage\?"),
        (["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.every=3"], r".*takes logging_interval, .*"),
        (["--data.batch_size=1.5"], r"--data\.batch_size is 1\.5; it must be an integer\."),
        (["--model.layer_input=kep"], r"--model\.layer_input is kep; it must be one of keep, offload\."),
        (["--model.betas=[0.9]"], r"--model\.betas is \[0\.9\]; it must be a list of 2\."),
        (["--trainer.precision=bf17"], r"--trainer\.precision is bf17; it must be one of bf16-true, 32-true, 32\."),
        (["--model.learning_rate"], r"--model\.learning_rate needs a value\."),
        (["stray"], r"stray is not an option; options are written --NAME=VALUE\."),
        (["--config=none.yaml"], r"the config none\.yaml cannot be read, No such file .*; give another path\."),
        (["--export.max_shard_size=big"], r"max_shard_size 'big' is not a size; write it as 5GB or 500MB"),
    ],
)  # fmt: skip
def test_the_line_names_what_was_meant(args: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--config", TINY, *args)
    assert re.fullmatch(rf"{line}\??", said), said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {learningrate: 1}", r"model\.learningrate is not an option; did you mean model\.learning_rate\?"),
        ("modle.learning_rate: 1", r"modle\.learning_rate is not an option; did you mean model\.learning_rate\?"),
        ("trainer.strategy.init_args: {stge: 3}", r"trainer\.strategy\.init_args\.stge is .*mean .*init_args\.stage\?"),
        (
            "trainer: {callbacks: [{class_path: LearningRateMonitor, init_args: {logging_intervall: step}}]}",
            r"trainer\.callbacks\.init_args\.logging_intervall is not an option; did you mean .*\.logging_interval\?",
        ),
        ("model.learning_rate: fast", r"model\.learning_rate is fast; it must be a number\."),
        ("model: fast", r"model is fast; it must be a mapping, or its options one by one\."),
    ],
)
def test_in_a_file_the_line_names_file_and_key(
    text: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file that says it, which another one names."""
    (tmp_path / "wrong.yaml").write_text(f"config: {TINY}\n{text}\n")
    (tmp_path / "mine.yaml").write_text("config: wrong.yaml\ndata: {seed: 1}\n")
    said = refused(capsys, "--config", str(tmp_path / "mine.yaml"))
    assert re.fullmatch(rf"{tmp_path}/wrong\.yaml: {line}", said), said


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--data.batch_size=1")
    assert line.startswith("model.pretrained, data.train_files must be given, with --model.pretrained=VALUE or in a")


EP = "--trainer.strategy.expert_parallel_size"
ONE = ["--trainer.devices=1", "--trainer.strategy.init_args.sequence_parallel_size=1"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["fit", "--config", TINY, "--model.learningrate=1"], "did you mean --model.learning_rate?"),
        (["fit", "--config", TINY, "--trainer.enable_checkpointing=false"], "enable_checkpointing=False"),
        (["fit", "--config", TINY, "--trainer.strategy.config=/none.json"], "config but the path does not exist"),
        (
            ["fit", "--config", TINY, "--trainer.strategy={init_args: {stage: 2, offload_parameters: true}}"],
            "ZeRO stage 3",
        ),
        (["fit", "--config", TINY, *ONE, '--model.freeze=["no.such*"]'], "no parameter's name matches 'no.such*'"),
        (["fit", "--config", TINY, f"{EP}=2", "--trainer.strategy.stage=2"], "expert_parallel_size above 1 needs ZeRO"),
        (["fit", "--config", TINY, f"{EP}=3", "--trainer.devices=6"], "the 16 experts of a layer. It may be 1, 2."),
        (
            ["plan", "--config", TINY, f"{EP}=3"],
            "expert_parallel_size 3 must divide the 2 processes of a node, or be whole nodes",
        ),
        (["plan", "--config", TINY, "--expalin"], "did you mean --explain?"),
        (["export", "--ckpt=x", "--ot=y"], "did you mean --out?"),
        (["verify", "--model=/none"], "/none"),
    ],
)
def test_every_command_ends_in_one_line(args: list[str], line: str, tmp_path: Path) -> None:
    more = [f"--trainer.default_root_dir={tmp_path}"] if args[0] == "fit" else []
    result = run(*args, *more, check=False)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: ")
    assert line in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr and "usage:" not in result.stderr


@pytest.mark.parametrize("when", ["made", "set up"])
def test_a_mistake_of_ours_keeps_its_traceback(when: str, tmp_path: Path) -> None:
    """A callback that raises an ordinary ValueError, as a bug would."""
    bug = ["--trainer.callbacks+=tests.launch.broken.Broken", f"--trainer.callbacks.when={when}"]
    result = run("fit", "--config", TINY, *bug, f"--trainer.default_root_dir={tmp_path}", check=False)
    assert result.returncode == 1 and "Traceback" in result.stderr and "ValueError: a bug" in result.stderr
