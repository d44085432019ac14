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
