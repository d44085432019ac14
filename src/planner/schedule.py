"""What one micro-step comes to: operations for the streams of a GPU, and the memory on its way."""

from dataclasses import dataclass, field

from src.planner.ledger import Ledger
from src.planner.streams import HOST, Op


@dataclass
class Schedule:
    """forward_ops: how many of `ops` belong to the forward pass. gathered, reduced: elements through ZeRO, over all
    ranks; shared_gathered, shared_reduced: of shared experts, over the ranks that have the same. halved: of those
    reduced, what travels in bf16.

    host: the host's last operation. stolen: seconds of casts and copies on the device since the computation last paid
    for them. paid: those that it has paid for.
    """

    ops: list[Op] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    forward_ops: int = 0
    gathered: float = 0.0
    reduced: float = 0.0
    shared_gathered: float = 0.0
    shared_reduced: float = 0.0
    halved: float = 0.0
    host: int = -1
    stolen: float = 0.0
    paid: float = 0.0

    def add(self, stream: str, seconds: float, name: str, *after: int, beside: tuple[float, float] = (1.0, 1.0)) -> int:
        """Another operation; its index, for those that wait for it."""
        self.ops.append(Op(stream, seconds, name, after, beside))
        return len(self.ops) - 1

    def host_works(self, seconds: float, *after: int) -> None:
        """The host, which does one thing after the other, waits for operations and works."""
        self.host = self.add(HOST, seconds, "host", *after)
