"""The examples run as their first lines say."""

from pathlib import Path

from tests.command import run


def test_the_job_from_python(tmp_path: Path) -> None:
    result = run("--root", str(tmp_path), "--max_steps", "2", module="examples.finetune", ranks=2)
    assert "val/loss" in result.stdout  # of trainer.validate, after training
    assert "step 2/2" in result.stdout + result.stderr
    assert f"{tmp_path}/hf: 17.0 M parameters in transformers" in result.stdout
    assert (tmp_path / "checkpoints/last.ckpt").resolve().name == "step=2.ckpt"
