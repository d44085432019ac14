"""Which rows go into which optimizer step, micro-batch and data-parallel rank."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DistributedSampler

from .mixture import Mixture

EMPTY_ROW = -1


@dataclass(frozen=True)
class MicroBatch:
    """One rank's share of one micro-step: `batch_size` rows, and the tokens and targets of the whole optimizer step
    (over data-parallel ranks and accumulation), which divide its losses."""

    rows: tuple[int, ...]  # EMPTY_ROW pads the last step of an epoch
    step_tokens: int
    step_targets: int
    step_mtp_targets: int


class MicroBatchSampler(DistributedSampler[MicroBatch]):
    """Yields the `MicroBatch`es of one data-parallel rank.

    Optimizer step s takes rows order[s*G : (s+1)*G] of the epoch's order, G = num_replicas x batch_size x
    accumulate_grad_batches, so a step's rows do not depend on how G factors. Micro-step m of it gives rank r the rows
    from m*num_replicas*batch_size + r*batch_size on. Empty rows pad the last step: no row is repeated or dropped,
    and every step has the same number of micro-steps.

    It is a DistributedSampler so that Lightning keeps it and calls `set_epoch`.

    Args:
        row_tokens, row_targets, row_mtp_targets: [rows] tokens, labels and MTP labels of each row.
        shuffle: order of an epoch: a permutation seeded by seed + epoch, or the rows as they are.
        mixture: which rows an epoch has, and how often; by default all of them once.
    """

    def __init__(
        self,
        row_tokens: npt.NDArray[np.int64],
        row_targets: npt.NDArray[np.int64],
        row_mtp_targets: npt.NDArray[np.int64],
        *,
        batch_size: int,
        accumulate_grad_batches: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        mixture: Mixture | None = None,
    ) -> None:
        super().__init__(range(len(row_targets)), num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        # [rows, 3]: what is summed over a step, in MicroBatch's order
        self.row_counts = np.stack([row_tokens, row_targets, row_mtp_targets], axis=1)
        self.batch_size = batch_size
        self.accumulate_grad_batches = accumulate_grad_batches
        self.mixture = mixture
        self._start: tuple[int, int] | None = None

    @property
    def rows_per_step(self) -> int:
        return self.num_replicas * self.batch_size * self.accumulate_grad_batches

    @property
    def steps_per_epoch(self) -> int:
        rows = len(self.row_counts) if self.mixture is None else len(self.mixture)
        return -(-rows // self.rows_per_step)

    def __len__(self) -> int:
        """Micro-batches of a whole epoch, wherever it was resumed."""
        return self.steps_per_epoch * self.accumulate_grad_batches

    def resume_at(self, epoch: int, step: int) -> None:
        """Starts the next iteration, of epoch `epoch`, at its optimizer step `step`; later ones start at 0."""
        self._start = (epoch, step)

    def __iter__(self) -> Iterator[MicroBatch]:
        start = 0
        if self._start is not None:
            epoch, start = self._start
            self._start = None
            if epoch != self.epoch:
                raise RuntimeError(
                    f"the data is to be resumed in epoch {epoch}, but the trainer is in epoch {self.epoch}; the "
                    "LightningModule's on_load_checkpoint must call datamodule.restore_progress(checkpoint)"
                )
        order = self._order()
        for step in range(start, self.steps_per_epoch):
            rows = order[step * self.rows_per_step : (step + 1) * self.rows_per_step]
            counts = self.row_counts[rows].sum(0).tolist()
            # [G] -> [accumulation, num_replicas, batch_size]
            filled = np.full(self.rows_per_step, EMPTY_ROW, dtype=np.int64)
            filled[: len(rows)] = rows
            micro_steps = filled.reshape(self.accumulate_grad_batches, self.num_replicas, self.batch_size)
            for mine in micro_steps[:, self.rank]:
                yield MicroBatch(tuple(mine.tolist()), *counts)

    def _order(self) -> npt.NDArray[np.int64]:
        rows = np.arange(len(self.row_counts), dtype=np.int64)
        if self.mixture is not None:
            rows = self.mixture.rows(self.epoch, self.seed)
        if not self.shuffle:
            return rows
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return rows[torch.randperm(len(rows), generator=generator).numpy()]
