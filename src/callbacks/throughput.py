"""Tokens a second over the whole job, measured from one optimizer step's first micro-batch to its end."""

import time
from typing import Any

import lightning.pytorch as pl


class Throughput(pl.Callback):
    """Logs `train/tokens_per_second`: the step's unpadded tokens over all ranks by its wall time, validation and
    checkpoints apart."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._step = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._started is None:
            self._started = time.monotonic()
            self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step or self._started is None:
            return
        seconds = time.monotonic() - self._started
        self._started = None
        pl_module.log("train/tokens_per_second", batch["step_tokens"] / seconds, prog_bar=True)
