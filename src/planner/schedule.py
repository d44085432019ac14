"""One micro-step of a rank: operations for the streams of a GPU, and the memory that they take."""

from collections import Counter
from dataclasses import dataclass, field

from src.planner.ledger import Ledger
from src.planner.streams import HOST, Op


@dataclass
class Schedule:
    """forward_ops: how many of `ops` belong to the forward pass.

    gathered, reduced: elements through ZeRO, by the number of ranks over which they are partitioned.
    halved: elements reduced in bf16.
    host: the host's last operation. stolen: seconds of casts and copies on the device that no computation has been
    lengthened by yet. paid: those that one has.
    """

    ops: list[Op] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    forward_ops: int = 0
    gathered: Counter[int] = field(default_factory=Counter)
    reduced: Counter[int] = field(default_factory=Counter)
    halved: int = 0
    host: int = -1
    stolen: float = 0.0
    paid: float = 0.0

    def add(self, op: Op) -> int:
        """Adds an operation and returns its index, for those that wait for it."""
        self.ops.append(op)
        return len(self.ops) - 1

    def host_works(self, seconds: float, *after: int) -> None:
        """The host, which does one thing after the other, waits for operations and works."""
        self.host = self.add(Op(HOST, seconds, "host", after))
