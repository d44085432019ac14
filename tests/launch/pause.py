"""Holds a run between two steps until it has been asked to stop, so that a test knows where it will."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from src.callbacks.stop import Stop


class Pause(pl.Callback):
    """At the end of optimizer step `step`, touches `reached` and waits for the signal; once, not after a restart."""

    def __init__(self, step: int, reached: str) -> None:
        self.step, self.reached = step, Path(reached)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.reached.exists():
            self.step = -1

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step != self.step:
            return
        self.step = -1
        self.reached.touch()
        stop = next(callback for callback in trainer.callbacks if isinstance(callback, Stop))  # type: ignore[attr-defined]
        deadline = time.monotonic() + 60
        while stop._signal is None and time.monotonic() < deadline:
            time.sleep(0.05)
