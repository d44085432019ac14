"""The flag that tells a layer's forward that it runs for the second time, to restore what its backward needs.

Activation checkpointing runs every layer again in the backward pass. The experts, the costly part, must not: they
recompute themselves (experts.py). `strategies/parallelize.py` hands `recompute` to torch's checkpoint as `context_fn`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_recomputing = False


@contextmanager
def recompute() -> Iterator[None]:
    global _recomputing
    _recomputing = True
    try:
        yield
    finally:
        _recomputing = False


def recomputing() -> bool:
    return _recomputing
