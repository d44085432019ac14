"""Best-fit-decreasing packing of samples into rows of at most max_length tokens."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PackedRows:
    """Which samples make up which row: row r holds samples[offsets[r] : offsets[r + 1]]; no row is empty."""

    samples: npt.NDArray[np.int64]  # [number of samples]
    offsets: npt.NDArray[np.int64]  # [rows + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        return self.samples[self.offsets[row] : self.offsets[row + 1]]

    def sum(self, values: IntArray) -> npt.NDArray[np.int64]:
        """Adds up a value of the samples (its length, its targets) over each row: [samples] -> [rows]."""
        if len(self) == 0:
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(values[self.samples].astype(np.int64), self.offsets[:-1])


def one_sample_a_row(count: int) -> PackedRows:
    return PackedRows(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def pack(lengths: IntArray, max_length: int) -> PackedRows:
    """Packs samples into rows: longest first, each into the fullest row that still has room for it.

    Deterministic, so every rank computes the same rows. O(n log n): open rows are found by their free space, of which
    there are at most max_length different values. The rows of real chat data are full to a fraction of a percent.

    Args:
        lengths: [n] tokens of each sample, between 1 and max_length.
    """
    assert len(lengths) == 0 or (lengths.min() > 0 and lengths.max() <= max_length)
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    shortest = int(lengths.min()) if len(lengths) else 0
    rows = np.empty(len(lengths), dtype=np.int64)  # of the samples in `order`
    spaces: list[int] = []  # distinct free spaces of open rows, ascending
    open_rows: dict[int, list[int]] = {}
    count = 0
    for place, length in enumerate(lengths[order].tolist()):
        tightest = bisect_left(spaces, length)
        if tightest == len(spaces):
            row, space = count, max_length
            count += 1
        else:
            space = spaces[tightest]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del spaces[tightest], open_rows[space]
        rows[place] = row
        left = space - length
        if left >= shortest:
            if left not in open_rows:
                insort(spaces, left)
                open_rows[left] = []
            open_rows[left].append(row)
    by_row = np.argsort(rows, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.int64)
    return PackedRows(order[by_row], offsets)
