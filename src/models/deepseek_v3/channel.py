"""What passes a layer's shards of experts beside autograd, which sees handles alone: tokens and their gradients.

Legend: T tokens, K experts a token, e experts of a shard, M rows of a shard, H hidden.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import add_rows, sum_rows


class Coming(Protocol):
    """A tensor on its way."""

    def wait(self) -> Tensor:
        """Has the stream that computes wait for it."""
        ...


class Channel:
    """Carries to a layer's shards its tokens x [T, H], and in the backward its output's gradient [T, H].

    Args:
        piece: rows that a shard multiplies at once; they are then summed in `total`, fp32 [T, H]. None: all, and the
            shards return them.
        spare: whether some tokens have places of the route without a row.
    """

    x: Tensor | None = None
    grad: Tensor | None = None
    total: Tensor | None = None

    def __init__(self, piece: int | None = None, spare: bool = False) -> None:
        self._piece, self._spare = piece, spare

    def open(self, x: Tensor | None, grad: Tensor | None = None) -> None:
        assert x is not None
        self.x, self.grad = x, grad
        if self._piece is not None:
            self.total = x.new_zeros(x.shape, dtype=torch.float32)

    def of(self, shard: int) -> "Channel":
        """What a shard, by its place among those that are here, reads and writes."""
        return self

    def pieces(self, offsets: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Which of a shard's rows to multiply at once, and where each expert's [e] end among them.

        offsets: [L, e], where they end in each of the shard's legs, of which there is one here.
        """
        return self._cut(offsets[0], rows)

    def _cut(self, ends: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
        piece = self._piece or rows
        for begin in range(0, rows, piece or 1):
            end = min(rows, begin + piece)
            yield slice(begin, end), ends if piece == rows else (ends - begin).clamp(0, end - begin)

    def take(self, rows: Tensor, tokens: Tensor, handle: Tensor) -> Tensor:
        """A shard's rows, or, where pieces of them [m, H] are summed at once, `handle`."""
        if self.total is None:
            return rows
        add_rows(self.total, rows, tokens)
        return handle

    def close(self, rows: Sequence[Tensor], slots: Tensor, parts: Tensor) -> Tensor:
        """Each token's rows summed in fp32, rounded once -> [T, H]; lets go of the tokens."""
        if self.total is not None:
            return self._sums(rows[0].dtype)
        self.x = self.grad = None
        spare = [rows[0].new_zeros(1, rows[0].shape[1])] if self._spare else []
        return sum_rows([*rows, *spare], slots, parts)

    def _sums(self, dtype: torch.dtype) -> Tensor:
        """What pieces have added up to; lets go of it and of the tokens."""
        assert self.total is not None
        sums = self.total.to(dtype)
        self.x = self.grad = self.total = None
        return sums

    def by_place(self, values: Sequence[Tensor], slots: Tensor) -> Tensor:
        """A value of each row, by shard -> [T, K], zero in spare places."""
        spare = [values[0].new_zeros(1)] if self._spare else []
        return torch.cat([*values, *spare])[slots]
