"""Warns when the training loss jumps."""

import logging
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

log = logging.getLogger(__name__)


class LossSpike(pl.Callback):
    """Warns where a step's `train/loss` stands far above its running mean.

    Args:
        deviations: how many running standard deviations above are a spike.
        memory: steps over which the running mean and deviation forget; none is reported before that many.
    """

    def __init__(self, deviations: float = 6.0, memory: int = 50) -> None:
        self.deviations, self.memory = deviations, memory
        self._mean, self._variance, self._seen, self._step = 0.0, 0.0, 0, 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer)  # at the previous step, whose loss is logged after the callbacks' batch end

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == self._step or "train/loss" not in trainer.callback_metrics:
            return
        self._step = trainer.global_step
        loss = float(trainer.callback_metrics["train/loss"])
        if trainer.is_global_zero and self.is_spike(loss):
            log.warning("step %d: the loss jumped to %.4f, its running mean is %.4f", self._step, loss, self._mean)
        self.update(loss)

    def is_spike(self, loss: float) -> bool:
        return self._seen >= self.memory and loss > self._mean + self.deviations * self._variance**0.5

    def update(self, loss: float) -> None:
        """Adds one step's loss to the running mean and variance."""
        self._seen += 1
        weight = 1 / min(self._seen, self.memory)
        difference = loss - self._mean
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)
