"""What a layer's forward knows of activation checkpointing: that it runs again, and what it may keep until then.

Activation checkpointing runs every layer again in the backward pass, to restore what that needs. The experts, the
costly part, must not run: they recompute themselves (experts.py). `strategies/parallelize.py` hands `recompute` to
torch's checkpoint as `context_fn`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..offload import HostStack

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


def placeholder(x: Tensor, rows: int, width: int) -> Tensor:
    """A tensor [rows, width] for autograd alone, of one element's memory: what nobody reads."""
    return x.new_empty(1).expand(rows, width)


def unhooked(module: nn.Module) -> Callable[..., Any]:
    """How to call a module whose weight a recomputation does not need: then past the hooks that gather it."""
    return module.forward if recomputing() else module


class Kept:
    """Results that one layer keeps over its recomputation instead of computing them again.

    Args:
        host: where they wait; None leaves them on the device.
    """

    def __init__(self, host: HostStack | None) -> None:
        self._host = host
        self._results: list[list[Any]] = []

    def begin(self) -> None:
        """To be called at the start of the layer: what a forward pass without a backward has left is dropped."""
        if not recomputing():
            self._results.clear()

    def once(self, compute: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What `compute` returned in the forward pass; in the recomputation, which asks in the same order, without it.

        With a host, tensors alone.
        """
        if recomputing():
            results = self._results.pop(0)
            return tuple(results if self._host is None else (self._host.take(item) for item in results))
        computed = compute()
        self._results.append(list(computed) if self._host is None else [self._host.put(t) for t in computed])
        return computed
