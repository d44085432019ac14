"""Device memory followed in the order in which the host allocates and frees it, which is what the allocator counts."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Item:
    """group: the line of the account that it belongs to; why: its formula with the numbers put in."""

    group: str
    nbytes: float
    why: str


@dataclass
class Ledger:
    """What is allocated now, and what was at the worst moment.

    live: items by name. peak: their sum at the worst moment; at_peak: the items then; moment: what was running.
    """

    live: dict[str, Item] = field(default_factory=dict)
    total: float = 0.0
    peak: float = 0.0
    moment: str = ""
    at_peak: dict[str, Item] = field(default_factory=dict)
    now: str = ""

    def take(self, name: str, group: str, nbytes: float, why: str) -> None:
        assert name not in self.live, name
        self.live[name] = Item(group, nbytes, why)
        self.total += nbytes
        if self.total > self.peak:
            self.peak, self.moment, self.at_peak = self.total, self.now, dict(self.live)

    def give(self, name: str) -> None:
        self.total -= self.live.pop(name).nbytes

    def passing(self, name: str, group: str, nbytes: float, why: str) -> None:
        """Taken and given back before anything else happens."""
        self.take(name, group, nbytes, why)
        self.give(name)
