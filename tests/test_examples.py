"""The examples run as their first lines say, and what the overview shows of their model is what the commands print."""

from pathlib import Path

from tests.command import run
from tests.test_pages import pasted, shape

SMALL = (
    "--trainer.devices=1",
    "--trainer.strategy.init_args.sequence_parallel_size=1",
    "--trainer.limit_val_batches=1",
)


def test_the_job_from_python(tmp_path: Path) -> None:
    result = run("--root", str(tmp_path), "--max_steps", "2", module="examples.finetune", ranks=2)
    assert "val/loss" in result.stdout  # of trainer.validate, after training
    assert "step 2/2" in result.stdout + result.stderr
    assert f"{tmp_path}/hf: 17.0 M parameters in transformers" in result.stdout
    checkpoint = tmp_path / "checkpoints/last.ckpt"
    assert checkpoint.resolve().name == "step=2.ckpt"
    commands = (
        ("validate", "--config=configs/tiny_cpu.yaml", f"--ckpt_path={checkpoint}", *SMALL),
        ("export", "--ckpt", str(checkpoint), "--out", f"{tmp_path}/exported/hf"),
        ("verify", "--model", f"{tmp_path}/exported/hf", "--layout-only"),
        ("verify", "--model", f"{tmp_path}/exported/hf"),
    )
    shown = pasted("docs/overview.md", "$ python -m src.cli validate").split("$ ")[1:]
    for arguments, text in zip(commands, shown, strict=True):
        command, *expected = shape(text)
        assert command.startswith(f"python -m src.cli {arguments[0]} ")
        result = run(*arguments)
        printed = shape(result.stderr + result.stdout)[-len(expected) :]
        # Which tensor differs most is the machine's.
        assert [line.partition("difference: ")[0] for line in printed] == [
            line.partition("difference: ")[0] for line in expected
        ]
