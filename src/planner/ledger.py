"""Device memory in the order in which the host allocates and frees it, as the allocator counts it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

# The account's lines of what a micro-step allocates.
GROUPS = SHARDS, GRADIENTS, INPUTS, KEPT, LAYER, LOSS = (
    "gathered weights",
    "whole gradients",
    "layer inputs",
    "attention outputs kept or fetched",
    "work of one layer",
    "head and loss",
)


@dataclass(frozen=True)
class Line:
    """A line of the account: bytes, their formula with the numbers put in, and of host memory when it is allocated."""

    name: str
    nbytes: float
    why: str
    when: str = ""


def total(lines: Iterable[Line]) -> float:
    return sum(line.nbytes for line in lines)


@dataclass
class Ledger:
    """What is allocated now, and what was at the worst moment.

    live: by the name of what is allocated, with the line of the account that it belongs to. total: its bytes.
    peak: the total at the worst moment; at_peak: what was live then; moment: what was running.
    """

    live: dict[str, Line] = field(default_factory=dict)
    total: float = 0.0
    peak: float = 0.0
    moment: str = ""
    at_peak: dict[str, Line] = field(default_factory=dict)
    now: str = ""

    def take(self, name: str, line: Line) -> None:
        assert name not in self.live, name
        self.live[name] = line
        self.total += line.nbytes
        if self.total > self.peak:
            self.peak, self.moment, self.at_peak = self.total, self.now, dict(self.live)

    def give(self, name: str) -> None:
        self.total -= self.live.pop(name).nbytes

    def passing(self, line: Line) -> None:
        """Taken and given back before anything else happens."""
        self.take("passing", line)
        self.give("passing")
