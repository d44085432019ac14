"""A run that is to stop: its step is saved once, all ranks end together, and it goes on as if nothing had happened."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from src.callbacks.step_checkpoint import StepCheckpoint
from src.callbacks.stop import MARGIN, Stop

from .spawn import run_distributed
from .training import Layout, Recipe, fit

TWO = Layout(dp=2, sp=1, accumulation=2, batch_size=1)
RECIPE = Recipe(mtp_loss_weight=0.0, steps=7)
DOCUMENTS = 60
STEPS_AN_EPOCH = 5


class Asks(pl.Callback):
    """Signals one rank, in the middle of a step or of a validation; notes what else happens."""

    def __init__(self, rank: int, hook: str, step: int, number: int) -> None:
        self.rank, self.hook, self.step, self.number = rank, hook, step, number
        self.ended = False
        self.validated = 0

    def _maybe(self, trainer: pl.Trainer, hook: str) -> None:
        if (hook, trainer.global_step, trainer.global_rank) == (self.hook, self.step, self.rank):
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._maybe(trainer, "train")

    def on_fit_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._maybe(trainer, "start")

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._maybe(trainer, "validation")

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.validated += 1

    def on_train_end(self, *args: Any) -> None:
        self.ended = True  # where finished runs export


def stopped_fit(directory: str, root: str, asks: Asks, every: int = 0, job_end: float | None = None) -> dict[str, Any]:
    """Trains from the newest checkpoint under `root`, or from the beginning, till the end or a stop."""
    if job_end is not None:
        os.environ["SLURM_JOB_END_TIME"] = str(job_end)
    checkpoints = sorted(Path(root).glob("checkpoints/step=*.ckpt"))
    code: Any = None
    found: dict[str, Any] = {}
    try:
        callbacks = (asks, StepCheckpoint(every_n_train_steps=every), Stop(marker=f"{root}/marker"))
        checkpoint = str(checkpoints[-1]) if checkpoints else None
        found = fit(TWO, RECIPE, directory, DOCUMENTS, root, more_callbacks=callbacks, checkpoint=checkpoint)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # given back
    except SystemExit as stopped:
        code = stopped.code
    return found | {"code": code, "ended": asks.ended, "validated": asks.validated}


def saved(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir()) if (root / "checkpoints").is_dir() else []


def outcome(results: list[dict[str, Any]]) -> list[tuple[Any, bool]]:
    return [(result["code"], result["ended"]) for result in results]


NEVER = Asks(0, "never", 0, signal.SIGUSR1)
STOPPED, FINISHED, FAILED = [(0, False)] * 2, [(None, True)] * 2, [(1, False)] * 2


def test_a_signal_to_one_rank_stops_all_and_nothing_is_lost(directory: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    asks = Asks(1, "train", 2, signal.SIGUSR1)
    assert outcome(run_distributed(stopped_fit, 2, directory, str(root), asks)) == STOPPED
    assert saved(root) == ["last.ckpt", "step=2.ckpt"]
    assert json.loads((root / "marker").read_text()) == {"step": 2, "why": "signal to another rank"}
    rest = run_distributed(stopped_fit, 2, directory, str(root), NEVER)
    whole = run_distributed(stopped_fit, 2, directory, str(tmp_path / "whole"), NEVER)
    assert outcome(rest) == outcome(whole) == FINISHED
    assert rest[0]["losses"] == whole[0]["losses"][2:]
    for name, weights in whole[0]["weights"].items():
        assert torch.equal(rest[0]["weights"][name], weights), name


class Interrupts(Asks):
    """Ctrl-C goes to all processes of a terminal, as often as it is pressed."""

    def __init__(self, step: int, times: int) -> None:
        super().__init__(-1, "train", step, signal.SIGINT)
        self.times = times

    def _maybe(self, trainer: pl.Trainer, hook: str) -> None:
        if (hook, trainer.global_step) == (self.hook, self.step):
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def test_ctrl_c_saves_and_a_second_one_does_not_wait(directory: str, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert outcome(run_distributed(stopped_fit, 2, directory, str(once), Interrupts(2, 1))) == STOPPED
    assert saved(once) == ["last.ckpt", "step=2.ckpt"]
    assert json.loads((once / "marker").read_text()) == {"step": 2, "why": "Ctrl-C"}
    results = run_distributed(stopped_fit, 2, directory, str(twice), Interrupts(2, 2))
    assert [result["code"] for result in results] == [1, 1] and saved(twice) == []


def test_ahead_of_the_jobs_end_a_step_that_is_saved_already_is_not_saved_again(directory: str, tmp_path: Path) -> None:
    """SIGTERM finds the run saving after each step."""
    asks = Asks(0, "train", 1, signal.SIGTERM)
    results = run_distributed(stopped_fit, 2, directory, str(tmp_path), asks, 1, time.time() + 800)
    assert outcome(results) == STOPPED and saved(tmp_path) == ["last.ckpt", "step=1.ckpt"]


def test_a_time_that_ends_after_a_step_saves_it_and_does_not_come_back(directory: str, tmp_path: Path) -> None:
    results = run_distributed(stopped_fit, 2, directory, str(tmp_path), NEVER, 0, time.time() + 1)
    assert outcome(results) == FAILED
    assert saved(tmp_path) == ["last.ckpt", "step=1.ckpt"] and not (tmp_path / "marker").exists()


def test_a_lead_that_the_time_has_no_room_for_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop(lead=1800.0)
    for left, lead in ((20_000, 1800), (1800, 450), (-5, 0)):
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + left))
        stop._fit_lead(is_rank_zero=True)
        assert stop.lead == pytest.approx(lead, abs=1)


def test_validation_is_cut_short(directory: str, tmp_path: Path) -> None:
    """It stands at the end of the first epoch, after the fifth of seven steps."""
    asks = Asks(1, "validation", STEPS_AN_EPOCH, signal.SIGUSR1)
    results = run_distributed(stopped_fit, 2, directory, str(tmp_path), asks)
    assert outcome(results) == STOPPED and results[0]["validated"] == 0
    assert saved(tmp_path) == ["last.ckpt", f"step={STEPS_AN_EPOCH}.ckpt"]


def test_a_training_that_has_ended_is_no_run_to_continue(directory: str, tmp_path: Path) -> None:
    asks = Asks(1, "train", RECIPE.steps, signal.SIGUSR1)
    assert outcome(run_distributed(stopped_fit, 2, directory, str(tmp_path), asks)) == FINISHED
    assert not (tmp_path / "marker").exists() and f"step={RECIPE.steps}.ckpt" in saved(tmp_path)


def test_a_run_that_trained_nothing_is_not_continued_for_ever(directory: str, tmp_path: Path) -> None:
    asks = Asks(0, "start", 0, signal.SIGTERM)
    assert outcome(run_distributed(stopped_fit, 2, directory, str(tmp_path), asks)) == FAILED
    assert saved(tmp_path) == [] and not (tmp_path / "marker").exists()


def test_the_lead_is_measured(tmp_path: Path) -> None:
    stop, checkpoint = Stop(lead=700.0, time_limit="01:02:03:04"), StepCheckpoint()
    assert stop.time_limit == 93784.0 and stop.needed(checkpoint) == 700.0
    stop._time_step(300.0)
    assert stop.needed(checkpoint) == 700.0
    checkpoint.save_seconds = 50.0
    assert stop.needed(checkpoint) == 300.0 + 2 * 50.0 + MARGIN
    for seconds in (20.0, 30.0, 25.0):  # the first step, which compiles, counts no longer
        stop._time_step(seconds)
    assert stop.needed(checkpoint) == 30.0 + 2 * 50.0 + MARGIN


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="stop.lead is 0; it must be positive"):
        Stop(lead=0)
    with pytest.raises(ValueError, match="stop.time_limit is '3h'; it must be days:hours"):
        Stop(time_limit="3h")
