"""Training files mixed by weight: which packed rows an epoch has.

Each entry of `train_files` is packed by itself. With weight 2.3 every epoch has all its rows twice and three tenths of
them once more: epoch e takes the e-th of equal parts of one seeded order and wraps around, so that each row comes once
before any comes again. So every epoch has the same, known number of rows and steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from src.errors import UserError
from src.units import counted

from .packing import PackedRows


@dataclass(frozen=True)
class Part:
    """The adjacent rows of one entry of `train_files`."""

    entry: str
    weight: float
    rows: int  # of the entry, each counted once
    tokens: int
    targets: int

    @property
    def whole(self) -> int:
        """How often each row is in an epoch, rounded down."""
        return math.floor(self.weight)

    @property
    def more(self) -> int:
        """How many rows are in an epoch once more."""
        return round((self.weight - self.whole) * self.rows)

    @property
    def rows_an_epoch(self) -> int:
        return self.whole * self.rows + self.more

    def an_epoch(self, count: int) -> int:
        """A count over the entry's rows, per epoch; for a fractional weight the mean over epochs."""
        return round(count * self.rows_an_epoch / max(self.rows, 1))


@dataclass(frozen=True)
class Mixture:
    """The parts in the order of their rows."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        """Rows of an epoch."""
        return sum(part.rows_an_epoch for part in self.parts)

    def rows(self, epoch: int, seed: int) -> npt.NDArray[np.int64]:
        """The rows of an epoch with repetitions, by entry: int64 [len(self)]."""
        import torch  # here, since `plan` reads mixtures without torch

        taken, first = [], 0
        for index, part in enumerate(self.parts):
            every = np.arange(first, first + part.rows, dtype=np.int64)
            taken += [every] * part.whole
            if part.more:
                generator = torch.Generator().manual_seed(seed + index)
                order = torch.randperm(part.rows, generator=generator).numpy()
                places = (epoch * part.more + np.arange(part.more)) % part.rows
                taken.append(every[order[places]])
            first += part.rows
        return np.concatenate(taken)

    def lines(self) -> list[tuple[str, str]]:
        """Per part: entry with weight, and its rows and tokens per epoch, as text."""
        tokens, targets = (
            max(sum(part.an_epoch(getattr(part, name)) for part in self.parts), 1) for name in ("tokens", "targets")
        )
        return [
            (
                f"{part.weight:g} x {part.entry if len(part.entry) <= 40 else '…' + part.entry[-39:]}",
                f"{counted(part.rows_an_epoch, 'row')} per epoch, of {part.rows:,}; "
                f"{part.an_epoch(part.tokens):,} tokens ({part.an_epoch(part.tokens) / tokens:.1%}), "
                f"{part.an_epoch(part.targets):,} trained ({part.an_epoch(part.targets) / targets:.1%})",
            )
            for part in self.parts
        ]


def check_weights(weights: Sequence[float], entries: Sequence[str]) -> None:
    """Refuses invalid weights.

    Raises:
        ValueError: not one for each entry, one that is negative or not finite, or all zero.
    """
    if len(weights) != len(entries):
        raise UserError(
            f"data.train_weights has {counted(len(weights), 'value')}, "
            f"data.train_files {counted(len(entries), 'entry', 'entries')}; give one weight "
            "for each entry (a glob is one entry)"
        )
    for weight, entry in zip(weights, entries, strict=True):
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(
                f"data.train_weights: {weight} for {entry!r}; a weight says how often the entry's conversations are in "
                "an epoch: 0 (not at all) or more"
            )
    if not any(weights):
        raise UserError("data.train_weights are all 0: there is nothing to train on; give one entry more")


def mix(
    entries: Sequence[str],
    weights: Sequence[float],
    packed: Sequence[PackedRows],
    tokens: npt.NDArray[np.int32],
    targets: npt.NDArray[np.int32],
) -> tuple[PackedRows, Mixture]:
    """Puts the entries' rows together, those of weight 0 too.

    Args:
        packed: each entry's rows, of sample numbers that count over all entries.
        tokens, targets: [samples] of all entries.

    Raises:
        ValueError: a weight above 0 comes to no row.
    """
    parts = []
    for entry, weight, rows in zip(entries, weights, packed, strict=True):
        sums = (int(values[rows.samples].sum(dtype=np.int64)) for values in (tokens, targets))
        part = Part(entry, weight, len(rows), *sums)
        if weight > 0 and part.rows and not part.rows_an_epoch:
            raise UserError(
                f"data.train_weights: {weight:g} of the {part.rows} packed rows of {entry!r} is not one row; raise it "
                f"to {1 / part.rows:.2g} or more, set it to 0, or lower data.max_length"
            )
        parts.append(part)
    ends = np.cumsum([0, *(len(rows.samples) for rows in packed)])
    offsets = [rows.offsets[1:] + end for rows, end in zip(packed, ends[:-1], strict=True)]
    samples = np.concatenate([rows.samples for rows in packed])
    mixture = Mixture(tuple(parts))
    if not len(mixture):
        raise UserError("data.train_weights: the entries of a weight above 0 have no samples; give others more than 0")
    return PackedRows(samples, np.concatenate([[0], *offsets]).astype(np.int64)), mixture
