"""A schedule played on the streams of one GPU: each stream takes its operations in order, one at a time.

An operation starts when its stream is free and everything that it waits for has ended.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HOST, COMPUTE = "the host", "compute"
GATHER, REDUCE, SP, TO_HOST, FROM_HOST, CAST = (
    "ZeRO network: gathers and reductions",
    "ZeRO network: gathers and reductions",  # one communicator, so one stream
    "SP exchange",
    "copies to the host",
    "copies from the host",
    "gradients: cast and sum",
)
STREAMS = (HOST, COMPUTE, GATHER, SP, TO_HOST, FROM_HOST, CAST)


@dataclass(frozen=True)
class Op:
    """after: indices of operations of the same schedule that must have ended."""

    stream: str
    seconds: float
    name: str
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Span:
    op: Op
    start: float
    end: float


def play(ops: Sequence[Op]) -> list[Span]:
    """When each operation runs, in seconds from the start."""
    free: dict[str, float] = {}
    spans: list[Span] = []
    for op in ops:
        start = max([free.get(op.stream, 0.0), *(spans[i].end for i in op.after)])
        spans.append(Span(op, start, start + op.seconds))
        free[op.stream] = spans[-1].end
    return spans


def makespan(spans: Iterable[Span]) -> float:
    return max((span.end for span in spans), default=0.0)


def busy(ops: Iterable[Op]) -> dict[str, float]:
    """Seconds of work on each stream."""
    total = dict.fromkeys(STREAMS, 0.0)
    for op in ops:
        total[op.stream] += op.seconds
    return total
