"""What Lightning's users do from habit works."""

from pathlib import Path

import pytest

from tests.command import run
from tests.commands.test_cli import fit_args

ONE = ["--trainer.devices=1", "--trainer.strategy.init_args.sequence_parallel_size=1"]
HABITS = {
    "fast_dev_run": ["--trainer.fast_dev_run=true"],
    "limits": ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"],
    "a callback": ["--trainer.callbacks+=lightning.pytorch.callbacks.Timer", "--trainer.max_steps=1"],
    "a logger": ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.max_steps=1"],
    "a profiler": ["--trainer.profiler=simple", "--trainer.max_steps=1"],
    "anomalies": ["--trainer.detect_anomaly=true", "--trainer.max_steps=1"],
    "another seed": ["--seed_everything=7", "--trainer.max_steps=1"],
}


@pytest.mark.parametrize("habit", HABITS)
def test_fit_takes_it(habit: str, inputs: Path, tmp_path: Path) -> None:
    more = [*HABITS[habit], f"--trainer.logger.save_dir={tmp_path}"] if habit == "a logger" else HABITS[habit]
    result = run(*fit_args(inputs, tmp_path / "run", *ONE, *more), check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    saved = list((tmp_path / "run").glob("checkpoints/step=*.ckpt"))
    assert bool(saved) == (habit != "fast_dev_run")


def test_overfit_batches_is_refused_with_what_does_it(inputs: Path, tmp_path: Path) -> None:
    result = run(*fit_args(inputs, tmp_path, *ONE, "--trainer.overfit_batches=2"), check=False)
    assert result.returncode == 2 and "use --trainer.limit_train_batches 2 instead" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_try_stands_in_no_runs_way(inputs: Path, tmp_path: Path) -> None:
    args = fit_args(inputs, tmp_path, *ONE, "--trainer.max_steps=1")
    run(*args, "--trainer.fast_dev_run=true")
    run(*args)
    assert (tmp_path / "checkpoints/step=1.ckpt").is_dir()
