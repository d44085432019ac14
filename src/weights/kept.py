"""How much of the training survives in rounded weights.

Training has changed the base's weights by d = masters - base; rounded to a dtype, they have changed by
r = rounded(masters) - rounded(base). Two figures over a set of weights:

    kept    r . d / d . d       1: the whole training, on average; 0: none of it, the base is served
    error   |r - d| / |d|       of single weights; it may be above 1 even if all is kept
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch

from src.weights.fp8 import quantise_change
from src.weights.hf_reader import HFDirectorySource

GROUPS = ("whole", "experts", "attention", "the rest")
ENOUGH = 0.9  # of the training; below it a warning


@dataclass
class Kept:
    """The sums over weights from which both figures follow."""

    along: float = 0.0  # r . d
    change: float = 0.0  # d . d
    error: float = 0.0  # |r - d|^2

    def add(self, rounded: torch.Tensor, change: torch.Tensor) -> None:
        """Counts fp32 changes [n] of rounded weights and of masters."""
        self.along += float((rounded * change).sum(dtype=torch.float64))
        self.change += float(change.square().sum(dtype=torch.float64))
        self.error += float((rounded - change).square().sum(dtype=torch.float64))

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(self.along + other.along, self.change + other.change, self.error + other.error)

    @property
    def part(self) -> float:
        """NaN if nothing was changed."""
        return self.along / self.change if self.change else math.nan

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.change) if self.change else math.nan


@dataclass
class Change:
    """Measures how much of one tensor's change from `base` is kept, while its chunks are written.

    `kept` is by dtype: of FP8 also what BF16 would keep; of what is BF16 either way, BF16 alone.
    """

    base: HFDirectorySource
    name: str
    kept: dict[str, Kept] = field(default_factory=dict)

    def start(self) -> None:
        self.kept = {}

    def notes(self) -> dict[str, dict[str, float]]:
        """`kept` as JSON values."""
        return {dtype: asdict(kept) for dtype, kept in self.kept.items()}

    def cast(self, masters: torch.Tensor, start: int) -> None:
        """Counts fp32 masters [n], elements from `start` on, cast to BF16."""
        before = self.base.read(self.name, start, start + len(masters)).float()
        self._add("bf16", masters.bfloat16().float() - before.bfloat16().float(), masters - before)

    def quantise(self, masters: torch.Tensor, first_row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts fp32 masters [R, C], rows from `first_row` on, and quantises them; returns values and scales."""
        start = first_row * masters.shape[1]
        before = self.base.read(self.name, start, start + masters.numel()).float().view_as(masters)
        scales = self.base.scales(self.name, first_row, first_row + len(masters))
        values, scale, rounded = quantise_change(masters, before, scales)
        self._add("fp8", rounded, masters - before)
        self._add("bf16", masters.bfloat16().float() - before.bfloat16().float(), masters - before)
        return values, scale

    def _add(self, dtype: str, rounded: torch.Tensor, change: torch.Tensor) -> None:
        self.kept.setdefault(dtype, Kept()).add(rounded, change)


def group_of(name: str) -> str:
    """The group of GROUPS that a tensor belongs to, besides the whole."""
    if ".mlp.experts." in name:
        return "experts"
    return "attention" if ".self_attn." in name else "the rest"


def by_group(notes: Mapping[str, Mapping[str, Mapping[str, float]]], dtype: str) -> dict[str, Kept]:
    """The sums of tensors' notes over each of GROUPS in which anything was changed, written in `dtype`."""
    groups: dict[str, Kept] = {}
    for name, by_dtype in notes.items():
        kept = Kept(**(by_dtype.get(dtype) or by_dtype["bf16"]))  # in FP8 files some weights are BF16
        for group in ("whole", group_of(name)):
            groups[group] = groups.get(group, Kept()) + kept
    return {group: groups[group] for group in GROUPS if group in groups and groups[group].change}


def table(groups: Mapping[str, Kept]) -> str:
    """A Markdown table of both figures by group."""
    rows = [f"| {group} | {kept.part:.1%} | {kept.relative_error:.1%} |" for group, kept in groups.items()]
    return "\n".join(["| weights | of the training kept | error of single weights |", "| --- | --- | --- |", *rows])
