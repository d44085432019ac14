"""Finds conversations with the same tokens and targets, by digests, in constant memory per conversation."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cache import TokenCache
from .findings import Findings
from .rows import RowError

_LEAK = (
    "trains on the same tokens as {}; the validation loss then measures memory: remove the row from one of the files"
)
_COPY = "trains on the same tokens as {}; remove one, unless it is to count twice"


@dataclass(frozen=True)
class Conversations:
    """The rows of a set that have samples, 28 bytes each.

    `digests`: int64 [n, 2], of the tokens and targets of all samples; `files`, `rows`: int32 and int64 [n], index
    in `paths` and row of each.
    """

    paths: tuple[str, ...]
    digests: npt.NDArray[np.int64]
    files: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]

    def source(self, index: int) -> str:
        return f"{self.paths[self.files[index]]}:{self.rows[index]}"

    @classmethod
    def of(cls, cache: TokenCache) -> "Conversations":
        starts = first_samples(cache)
        return cls(tuple(cache.paths), cache.row_digests()[starts], cache.files[starts], cache.file_rows[starts])


@dataclass(frozen=True)
class Copies:
    """Remarks on duplicate conversations, and on validation conversations that are also in the training data."""

    remarks: Findings
    copies: int
    leaks: int

    @classmethod
    def among(cls, conversations: Conversations, train: Conversations | None) -> "Copies":
        """The copies within the conversations and, for a validation set, those that the training data has too."""
        remarks, leaks, copies = Findings(), 0, 0
        before = 0 if train is None else len(train.digests)
        own = firsts(conversations.digests)
        if train is not None:
            of_both = firsts(np.concatenate([train.digests, conversations.digests]))[before:]
            leaked = of_both < before
        else:
            of_both, leaked = own, np.zeros(len(own), dtype=bool)
        copied = own != np.arange(len(own))
        for index in np.flatnonzero(leaked | copied).tolist():
            if leaked[index]:
                assert train is not None
                leaks += 1
                remarks.add(RowError(conversations.source(index), "", _LEAK.format(train.source(int(of_both[index])))))
            if copied[index]:
                copies += 1
                remarks.add(
                    RowError(conversations.source(index), "", _COPY.format(conversations.source(int(own[index]))))
                )
        return cls(remarks, copies, leaks)


def first_samples(cache: TokenCache) -> npt.NDArray[np.int64]:
    """The first sample of each row that has any: int64 [rows]."""
    begins = np.ones(len(cache), dtype=bool)
    begins[1:] = (np.diff(cache.files) != 0) | (np.diff(cache.file_rows) != 0)
    return np.flatnonzero(begins)


def firsts(digests: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each digest [n, 2] the index of the first equal one, possibly itself: int64 [n]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones keep their order
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (digests[order[1:]] != digests[order[:-1]]).any(1)
    first = np.empty_like(order)
    first[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    return first
