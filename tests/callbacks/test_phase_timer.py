"""Phases follow Lightning's own actions: nested ones interrupt the outer, an error knows its phase."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler

from src.callbacks import phase_timer as module
from src.callbacks.phase_timer import PHASES, Phases
from src.callbacks.throughput import Throughput

from .stub import STEPS, Stub, train


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_inner_phase_interrupts_the_outer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    phases = Phases(PassThroughProfiler(), cuda=False)
    phases.take()

    def lasting(seconds: float) -> None:
        clock.now += seconds

    lasting(1)
    phases.start("[_TrainingEpochLoop].train_dataloader_next")
    lasting(2)
    phases.stop("[_TrainingEpochLoop].train_dataloader_next")
    with phases.profile("[LightningModule]SFTModule.optimizer_step"):
        lasting(4)
        with phases.profile("[Strategy]DeepSpeedSPStrategy.training_step"):
            lasting(8)
            with phases.profile("[Callback]Any.on_before_backward"):  # none of ours: time of what is around it
                lasting(16)
        with phases.profile("[Strategy]DeepSpeedSPStrategy.backward"):
            lasting(32)
        lasting(64)
        assert phases.phase == "optimizer"
    with phases.profile("save_checkpoint"):
        lasting(128)
        first = phases.take()  # in the middle of a phase
        lasting(256)
    expected = {"other": 1, "data": 2, "optimizer": 68, "forward": 24, "backward": 32, "checkpoint": 128}
    assert first == dict.fromkeys(PHASES, 0.0) | expected
    assert phases.take() == dict.fromkeys(PHASES, 0.0) | {"checkpoint": 256}


def test_an_error_knows_the_innermost_phase_it_came_from() -> None:
    phases = Phases(PassThroughProfiler(), cuda=False)
    with pytest.raises(KeyError), phases.profile("optimizer_step"), phases.profile("backward"):
        raise KeyError
    with pytest.raises(ValueError) as caught, phases.profile("optimizer_step"), phases.profile("training_step"):
        raise ValueError
    assert phases.failed_in(caught.value) == "forward" and phases.phase == "other"
    assert phases.failed_in(RuntimeError()) == "other"


def test_lightning_tells_every_phase_and_its_own_profiler_goes_on(tmp_path: Path) -> None:
    seen: list[str] = []

    class Seeing(Stub):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(Phases.of(self.trainer).phase)
            return super().training_step(batch, batch_idx)

        def backward(self, *args: Any) -> None:
            seen.append(Phases.of(self.trainer).phase)
            super().backward(*args)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(Phases.of(self.trainer).phase)

    profiler = SimpleProfiler()
    train(Seeing(), Throughput(), profiler=profiler, validate=True)
    assert set(seen) == {"forward", "backward", "validation"}
    assert len(profiler.recorded_durations["run_training_batch"]) == 2 * STEPS
