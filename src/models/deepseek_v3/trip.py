"""A layer's way through experts that ranks share, past autograd: what comes before the shards, and goes behind them.

Legend as in expert_parallel.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .channel import Channel, Coming
from .expert_parallel import Journey
from .recompute import placeholder, recomputing


class Trip(Channel):
    """All tokens together: they come before the first shard, and their sums go behind the last.

    began: autograd's number of what the tokens are the output of. In the backward what was computed since comes before
    the experts, while tokens and gradients travel.
    """

    _coming: Coming | None = None

    def __init__(self, journey: Journey, began: int | None) -> None:
        super().__init__(journey.piece, spare=True)
        self.journey, self.began = journey, began

    def depart(self, x: Tensor, grad: Tensor | None = None) -> None:
        """Starts to send tokens [T, H], in the backward beside their outputs' gradients."""
        self._coming = self.journey.leave(self.journey.legs[0], x, grad)

    def open(self, x: Tensor | None, grad: Tensor | None = None) -> None:
        assert self._coming is not None
        came, self._coming = self._coming.wait(), None
        super().open(*([came] if grad is None else came.unbind(1)))

    def home(self, rows: Tensor) -> Tensor:
        """Sums [R, H] of what has been received -> [T, H], of this rank's tokens."""
        return self.journey.together([self.journey.come(self.journey.legs[0], rows).wait()])


class TripInPieces(Trip):
    """Each shard has its own tokens come, piece by piece, and their sums go."""

    def __init__(self, journey: Journey, began: int | None) -> None:
        super().__init__(journey, began)
        self.own: tuple[Tensor, ...] = ()
        self.back: dict[int, Tensor] = {}  # by leg

    def depart(self, x: Tensor, grad: Tensor | None = None) -> None:
        self.own = (x,) if grad is None else (x, grad)

    def open(self, x: Tensor | None, grad: Tensor | None = None) -> None:
        pass

    def of(self, shard: int) -> Channel:
        return _Stop(self, shard)

    def close(self, rows: Sequence[Tensor], slots: Tensor, parts: Tensor) -> Tensor:
        return placeholder(rows[0], len(slots), rows[0].shape[1])

    def home(self, rows: Tensor) -> Tensor:
        back, self.back, self.own = self.back, {}, ()
        return self.journey.together([back[leg] for leg in range(len(back))])


class _Stop(Channel):
    """One shard's part of a trip in pieces."""

    def __init__(self, trip: TripInPieces, shard: int) -> None:
        super().__init__(trip.journey.piece)
        self._trip, self._shard = trip, shard

    def pieces(self, offsets: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
        trip, journey, done = self._trip, self._trip.journey, 0
        sizes = journey.local.sizes.read()
        for number, ends in enumerate(offsets, self._shard * len(offsets)):
            leg, count = journey.legs[number], int(sizes[number])
            came = journey.leave(leg, *trip.own).wait()
            self.open(*([came] if len(trip.own) == 1 else came.unbind(1)))
            for piece, piece_ends in self._cut(ends, count):
                yield slice(done + piece.start, done + piece.stop), piece_ends
            done += count
            del came
            trip.back[number] = journey.come(leg, self._sums(trip.own[0].dtype)).wait()


class Send(Function):
    """Tokens [T, H] and their experts' weights [T, K] -> what is received of all ranks, a handle [R, H] and [R, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, trip: Trip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        trip.journey.arrive()
        weights = trip.journey.weights.clone()
        return placeholder(x, len(weights), x.shape[1]), weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        journey: Journey = ctx.trip.journey
        back = [journey.come(leg, grad_weights[leg.received]) for leg in journey.legs]
        grad_x = ctx.trip.home(grad)
        grad_weights = journey.by_expert(torch.cat([rows.wait() for rows in back]))
        journey.forget()
        return grad_x, grad_weights, None


class Return(Function):
    """Outputs of the received rows [R, H] -> [T, H], each token's summed; the backward sends tokens and gradients."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, trip: Trip) -> Tensor:
        ctx.save_for_backward(x)
        ctx.trip = trip
        return placeholder(x, *x.shape) if recomputing() else trip.home(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.trip.depart(x, grad)
        return placeholder(grad, len(ctx.trip.journey.weights), grad.shape[1]), None, None
