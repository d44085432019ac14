"""Conversations with the same tokens and targets, found by digests in constant memory a conversation."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cache import TokenCache


@dataclass(frozen=True)
class Conversations:
    """The rows of a set that have samples, 28 bytes each.

    `digests`: uint64 [n, 2], of the tokens and targets of all samples; `files`, `rows`: int32 and int64 [n], where each
    stands, by number in `paths`.
    """

    paths: tuple[str, ...]
    digests: npt.NDArray[np.uint64]
    files: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]

    def source(self, index: int) -> str:
        return f"{self.paths[self.files[index]]}:{self.rows[index]}"

    @classmethod
    def of(cls, cache: TokenCache) -> "Conversations":
        starts = first_samples(cache)
        digests = bytearray()
        for start, stop in zip(starts, np.append(starts[1:], len(cache)), strict=True):
            digest = hashlib.blake2b(digest_size=16)
            for index in range(start, stop):
                document = cache.document(index)
                digest.update(np.asarray([len(document.input_ids), len(document.target_spans)]).tobytes())
                digest.update(document.input_ids.tobytes() + document.target_spans.tobytes())
            digests += digest.digest()
        found = np.frombuffer(bytes(digests), dtype=np.uint64).reshape(-1, 2)
        return cls(tuple(cache.paths), found, cache.files[starts], cache.file_rows[starts])


def first_samples(cache: TokenCache) -> npt.NDArray[np.int64]:
    """The first sample of each row that has any: int64 [rows]."""
    begins = np.ones(len(cache), dtype=bool)
    begins[1:] = (np.diff(cache.files) != 0) | (np.diff(cache.file_rows) != 0)
    return np.flatnonzero(begins)


def firsts(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """For each digest [n, 2] the place of the first that is equal, its own where it is the first: int64 [n]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so that equal ones stay in their order
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (digests[order[1:]] != digests[order[:-1]]).any(1)
    found = np.empty_like(order)
    found[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    return found
