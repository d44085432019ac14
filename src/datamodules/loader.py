"""The dataset and the data loader that turn a sampler's micro-batches into batches."""

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .cache import TokenCache
from .collate import Batch, collate, shard
from .packing import PackedRows
from .sampler import EMPTY_ROW, MicroBatch, MicroBatchSampler


class PackedDataset(Dataset[Batch]):
    """Indexed by a `MicroBatch`: this SP rank's slice of its rows, with the step's token and target counts.

    Args:
        more: entries that every batch gets.
    """

    def __init__(
        self,
        cache: TokenCache,
        rows: PackedRows,
        sp_rank: int = 0,
        sp_size: int = 1,
        more: dict[str, Any] | None = None,
    ) -> None:
        self.cache, self.rows = cache, rows
        self.sp_rank, self.sp_size = sp_rank, sp_size
        self.more = more or {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        rows = [row for row in micro_batch.rows if row != EMPTY_ROW]
        documents = [self.cache.document(int(sample)) for row in rows for sample in self.rows[row]]
        batch = shard(collate(documents, self.sp_size), self.sp_rank, self.sp_size)
        batch["step_tokens"] = micro_batch.step_tokens
        batch["step_targets"] = micro_batch.step_targets
        batch["step_mtp_targets"] = micro_batch.step_mtp_targets
        return batch | self.more


def _outlive_signals(worker: int) -> None:
    """Lets workers ignore the scheduler's signal: the ranks stop at their step's end and need rows until then."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class PackedDataLoader(DataLoader[Batch]):
    """A DataLoader whose iterators start at their first `next`, not at `iter`.

    Lightning calls `iter` before it has restored a checkpoint and set the sampler's epoch (in `setup_data`, which a
    scheduler that asks for `estimated_stepping_batches` brings forward even more). Workers that prefetch from then on
    would read the wrong rows.
    """

    sampler: MicroBatchSampler

    def __init__(self, dataset: PackedDataset, sampler: MicroBatchSampler, num_workers: int) -> None:
        super().__init__(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_outlive_signals,
            # Its own generator for the workers' seeds; otherwise each iterator would draw from the global one.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the datamodule knows the position. Lightning takes a loader without this for one that cannot resume
        and warns."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load; see `state_dict`."""
