"""What the model asks of a sequence-parallel (SP) group, and the group of one. The real one is made in strategies."""

from typing import Protocol

from torch import Tensor


class SequenceParallelGroup(Protocol):
    """The ranks that share one packed row, each holding a contiguous T/SP of its T tokens.

    Every operation is differentiable, and must be called by all ranks of the group in the same order.
    """

    rank: int
    size: int

    def all_gather(self, x: Tensor) -> Tensor:
        """[T/SP, ...] -> [T, ...]; backward sums the ranks' gradients in fp32."""
        ...

    def all_to_all(self, x: Tensor) -> Tensor:
        """[SP, ...] -> [SP, ...]: block j goes to rank j, block i comes from rank i."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the group; backward sums the ranks' gradients."""
        ...


class SingleProcess:
    """SP = 1: every operation is the identity."""

    rank = 0
    size = 1

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def all_to_all(self, x: Tensor) -> Tensor:
        return x

    def all_reduce(self, x: Tensor) -> Tensor:
        return x
