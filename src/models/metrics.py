"""Means by target token over all ranks and micro-batches."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanByTarget(Metric):
    """Sum of a quantity over the targets by their number, global and exact: both are added in fp64.

    torchmetrics' own MeanMetric drops its weights where NaN checks, which synchronise the device, are disabled.
    """

    total: Tensor
    targets: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, targets: Tensor) -> None:
        """total: sum over the targets of this rank's tokens, a scalar; targets: their number, an int64 scalar."""
        self.total += total.detach()
        self.targets += targets

    def compute(self) -> Tensor:
        """fp64 scalar; NaN before any target."""
        return self.total / self.targets


class ValidationMetrics:
    """Loss, perplexity and accuracy by target token of all validation sets, and of each that has a name."""

    def __init__(self) -> None:
        self._means: dict[str, tuple[MeanByTarget, MeanByTarget]] = {}  # "val", "val/NAME" -> loss, accuracy

    def update(self, name: str | None, loss: Tensor, correct: Tensor, targets: Tensor) -> None:
        """Adds this rank's part of a batch of the set `name`; every rank has the same sets, in the same order.

        loss, correct: sums over the targets, scalars; targets: their number, an int64 scalar.
        """
        for key in ("val",) if name is None else ("val", f"val/{name}"):
            if key not in self._means:
                self._means[key] = MeanByTarget().to(loss.device), MeanByTarget().to(loss.device)
            mean_loss, accuracy = self._means[key]
            mean_loss.update(loss, targets)
            accuracy.update(correct, targets)

    def compute(self) -> dict[str, Tensor]:
        """The metrics by the name that they are logged under, over all ranks; counting starts anew. Collective."""
        values: dict[str, Tensor] = {}
        for key, (mean_loss, accuracy) in self._means.items():
            loss = mean_loss.compute()
            values |= {f"{key}/loss": loss, f"{key}/perplexity": loss.exp(), f"{key}/accuracy": accuracy.compute()}
        self._means.clear()
        return values
