"""One micro-step of a rank as operations, and these played on the streams of its GPU.

Each stream takes its operations in order, one at a time.

An operation starts when its stream is free and everything that it waits for has ended. Computation and the
collectives beside it share the device's multiprocessors, so each takes longer while the other runs.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from src.planner.ledger import Ledger

STREAMS = HOST, COMPUTE, ZERO, SP, EP, TO_HOST, FROM_HOST, CAST = (
    "the host",
    "compute",
    "ZeRO network: gathers and reductions",  # one communicator, so one stream
    "SP exchange",
    "tokens to shared experts and back",
    "copies to the host",
    "copies from the host",
    "gradients: cast and sum",
)


class Op(NamedTuple):
    """seconds: alone on the device. after: indices of operations of the same schedule that must end first.

    beside: how many times as long a computation takes while a collective runs, and the collective then.
    nbytes: of an exchange between GPUs, what a rank receives.
    """

    stream: str
    seconds: float
    name: str = ""
    after: tuple[int, ...] = ()
    beside: tuple[float, float] = (1.0, 1.0)
    nbytes: float = 0.0


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


class Span(NamedTuple):
    op: Op
    start: float
    end: float


def play(ops: Sequence[Op]) -> list[Span]:
    """When each operation runs, in seconds from the start."""
    queues = {stream: deque(i for i, op in enumerate(ops) if op.stream == stream) for stream in STREAMS}
    spans: list[Span | None] = [None] * len(ops)  # those that have ended
    begun, left = [0.0] * len(ops), dict[str, float]()  # when; and seconds of the running operations, alone
    now = 0.0
    while True:
        for stream, queue in queues.items():
            if queue and stream not in left and all(spans[i] for i in ops[queue[0]].after):
                left[stream], begun[queue[0]] = ops[queue[0]].seconds, now
        if not left:
            break
        slower = dict.fromkeys(left, 1.0)
        for network in (ZERO, EP):
            if COMPUTE in left and network in left:
                slower[COMPUTE], slower[network] = ops[queues[COMPUTE][0]].beside
        times = {stream: seconds * slower[stream] for stream, seconds in left.items()}
        passed = min(times.values())
        now += passed
        for stream, seconds in times.items():
            if seconds > passed:
                left[stream] -= passed / slower[stream]
                continue
            del left[stream]
            index = queues[stream].popleft()
            spans[index] = Span(ops[index], begun[index], now)
    played = [span for span in spans if span is not None]
    assert len(played) == len(ops), "an operation waits for one that comes after it"
    return played


def scaled(ops: Iterable[Op], factors: Mapping[str, float]) -> list[Op]:
    """Operations that take so many times as long, by stream."""
    return [op._replace(seconds=op.seconds * factors.get(op.stream, 1.0)) for op in ops]


def slowed(spans: Iterable[Span]) -> float:
    """Seconds that computation takes longer beside collectives."""
    return max(0.0, sum(span.end - span.start - span.op.seconds for span in spans if span.op.stream == COMPUTE))


def covered(spans: Iterable[Span], *streams: str) -> float:
    """Seconds in which one of these streams is busy."""
    seconds = end = 0.0
    for span in sorted((span for span in spans if span.op.stream in streams), key=lambda span: span.start):
        seconds += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return seconds


def makespan(spans: Iterable[Span]) -> float:
    return max((span.end for span in spans), default=0.0)


def busy(ops: Iterable[Op]) -> dict[str, float]:
    """Seconds of work on each stream, alone on the device."""
    total = dict.fromkeys(STREAMS, 0.0)
    for op in ops:
        total[op.stream] += op.seconds
    return total


def received(ops: Iterable[Op], stream: str) -> float:
    """Bytes that a rank receives."""
    return sum(op.nbytes for op in ops if op.stream == stream)
