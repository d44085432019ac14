"""Expert parallelism: the ranks of a group share a layer's experts, and its tokens travel to them.

A token goes once to each rank that has any of its experts, with their numbers and weights; there its outputs are summed
in fp32, and one row comes back. So it is in the forward pass; a recomputation sends nothing. In the backward a token
goes again, beside its output's gradient, and one gradient comes back: what was received is never kept. Both times the
tokens travel while the layer computes what every token passes.

Usually all go at once. Where a rank would receive far more than usual, each shard has the tokens of its experts
come and return by itself, in pieces, so that ZeRO-3 gathers it no more often: a rank never holds more than a bound.

Legend: T this rank's tokens, K experts a token, H hidden, G ranks of the group, S rows sent, R rows received, M rows
that the experts here multiply, D destinations: the ranks, or their shards.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import sum_rows
from .channel import Coming
from .route import Route, host_copy, route

_ELSEWHERE = 1 << 30  # instead of an expert's number: it is on another rank


class ExpertParallelGroup(Protocol):
    """The ranks that share each layer's experts, in equal parts, in the order of the ranks."""

    rank: int
    size: int

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Coming:
        """Starts: rows [S, ...], sent[i] of them for rank i, in order -> [R, ...], received[i] of them from rank i.

        Without a gradient. Every rank of the group must call it, in the same order.
        """
        ...


class Leg(NamedTuple):
    """Rows that travel together: how many to and from each rank, and which range they are of all."""

    to: list[int]
    of: list[int]
    sent: slice
    received: slice


def _part(rows: int, piece: int, pieces: int) -> tuple[int, int]:
    return rows * piece // pieces, rows * (piece + 1) // pieces


def _legs(to: list[list[int]], of: list[list[int]], pieces: int) -> list[Leg]:
    """to, of: rows to and from each rank, for each of its destinations, whose legs follow one another."""
    legs, sent, received = list[Leg](), 0, 0
    for goal in range(len(to[0])):
        for piece in range(pieces):
            ends = [[_part(rows[goal], piece, pieces) for rows in numbers] for numbers in (to, of)]
            away, here = ([stop - start for start, stop in ranks] for ranks in ends)
            after, behind = sent + sum(away), received + sum(here)
            legs.append(Leg(away, here, slice(sent, after), slice(received, behind)))
            sent, received = after, behind
    return legs


def _by_leg(to: list[list[int]], pieces: int) -> Tensor:
    """[S]: the rows of all legs, as places in the order of ranks, destinations, tokens."""
    begins = iter(accumulate((n for rows in to for n in rows), initial=0))
    ranges = [[(begin, n) for n, begin in zip(rows, begins, strict=False)] for rows in to]
    legs = [(goal, piece) for goal in range(len(to[0])) for piece in range(pieces)]
    parts = [(rows[goal][0], *_part(rows[goal][1], piece, pieces)) for goal, piece in legs for rows in ranges]
    return torch.cat([torch.arange(begin + start, begin + stop) for begin, start, stop in parts])


class Journey:
    """How one layer's tokens get to their experts and back.

    The numbers of rows travel when it is made. `settle` waits for them, the layer's one wait for the device, and sends
    the experts' numbers and weights; `arrive` waits for these. A recomputation finds all of it here.

    Args:
        chosen: integers [T, K], each token's experts.
        experts, shards: that are on each rank.
        most: tokens that a rank receives at once, for each token of its own, the group's mean.
    """

    legs: list[Leg]  # as many on every rank of the group
    in_pieces: bool  # legs are for a shard each, in its order, equally many for all; otherwise there is one
    piece: int | None  # rows to be multiplied at once; None: all
    local: Route  # of the received rows, by legs in place of shards where they go in pieces
    weights: Tensor  # fp32 [R, K], of the received rows' experts, any value for a spare place

    def __init__(self, chosen: Tensor, experts: int, shards: int, group: ExpertParallelGroup, most: float) -> None:
        self.group, self._experts, self._shards, self._most = group, experts, shards, most
        self._chosen: Tensor | None = chosen
        self._told: list[Coming] = []
        tokens, size = len(chosen), group.size
        shard = chosen.long() // (experts // shards)  # [T, K], of all ranks'
        goes = torch.zeros(tokens, size * shards, dtype=torch.bool, device=chosen.device).scatter_(1, shard, True)
        rows = torch.zeros(size * shards, dtype=torch.int64, device=chosen.device)
        rows.scatter_add_(0, shard.flatten(), torch.ones_like(shard).flatten())
        reached = goes.view(tokens, size, shards).any(2).sum(0)  # [G], tokens that go to each rank
        # For each rank: the tokens here, its shards' rows, the tokens that go to each shard, to the rank, to all ranks.
        by_rank = [rows.new_full((size, 1), tokens), rows.view(size, shards), goes.sum(0).view(size, shards)]
        by_rank += [reached[:, None], reached.expand(size, size)]
        self._counts = torch.cat(by_rank, 1).int()  # kept until they have left
        ones = [1] * size
        self._received = host_copy(group.exchange(self._counts, ones, ones), chosen.device)

    def settle(self, weights: Tensor) -> None:
        """weights: fp32 [T, K], of the chosen experts."""
        if self._chosen is None:
            return
        chosen, (tokens, top_k), size = self._chosen, self._chosen.shape, self.group.size
        counts = self._received.read()  # by sender
        there, rows, for_shard, here, reached = counts.split([1, self._shards, self._shards, 1, size], 1)
        self._rows = rows.sum(0)  # [shards]
        share = max(1, -(-int(there.sum()) * top_k // size))
        received = reached.sum(0)  # [G], by each rank
        pieces = -(-int(received.max()) // max(1, int(self._most * int(there.sum()) / size)))
        self.in_pieces = pieces > 1
        self.piece = share if self.in_pieces or self._rows.sum() >= 2 * share else None
        unit = self._experts // (self._shards if self.in_pieces else 1)
        self._goal = (chosen // unit).int()  # [T, K], of D
        goes = torch.zeros(tokens, size * self._experts // unit, dtype=torch.bool, device=chosen.device)
        goes.scatter_(1, self._goal.long(), True)  # [T, D]
        if self.in_pieces:
            to, of = goes.sum(0).view(size, -1).tolist(), for_shard.tolist()
        else:
            to, of = reached[self.group.rank, :, None].tolist(), here.tolist()
        self.legs = _legs(to, of, max(1, pieces))

        # Rows in the order of destinations, a destination's in that of tokens; of pieces, in the order of legs.
        total = self.legs[-1].sent.stop
        ends = goes.T.reshape(-1).cumsum(0)  # [D*T]
        places = torch.searchsorted(ends, torch.arange(1, total + 1, device=ends.device))  # [S]: whose the n-th row is
        slots = torch.where(goes, (ends - 1).view(goes.T.shape).T, total)  # [T, D], S for none
        parts = ~goes  # [T, D]: in which leg, one behind the last for none
        if self.in_pieces:
            order = _by_leg(to, pieces).to(ends.device)
            places, moved = places[order], torch.full((total + 1,), total, device=ends.device)
            moved[order] = torch.arange(total, device=ends.device)
            slots = moved[slots]
            last = torch.tensor([leg.sent.stop for leg in self.legs], device=ends.device)
            parts = torch.searchsorted(last, slots, right=True)
        self._slots, self._parts = slots.int(), parts.int()
        self._tokens = (places % max(1, tokens)).int()  # [S]
        numbers = chosen[self._tokens].int() - (places // max(1, tokens) * unit).int()[:, None]  # [S, K], of goal's
        outside = (numbers < 0) | (numbers >= unit)
        told = torch.cat([numbers.masked_fill(outside, _ELSEWHERE), weights[self._tokens].view(torch.int32)], 1)
        self._told = [self.group.exchange(told[leg.sent], leg.to, leg.of) for leg in self.legs]  # 2K of a row
        self._chosen = None

    def arrive(self) -> None:
        if not self._told:
            return
        incoming = torch.cat([told.wait() for told in self._told])  # [R, 2K]
        self._told = []
        numbers, weights = incoming.chunk(2, 1)
        self.weights = weights.contiguous().view(torch.float32)
        if not self.in_pieces:
            self.local = route(numbers.clamp(max=self._experts), self._experts, self._shards, self._rows)
            return
        unit, legs = self._experts // self._shards, len(self.legs)
        received = torch.tensor([sum(leg.of) for leg in self.legs], device=numbers.device)
        leg = torch.arange(legs, device=numbers.device, dtype=torch.int32).repeat_interleave(received)
        numbers = (numbers + unit * leg[:, None]).clamp(max=unit * legs)
        sizes = torch.bincount((numbers // unit).flatten(), minlength=legs + 1)[:legs].cpu()
        found = route(numbers, unit * legs, legs, sizes)
        begins = (received.cumsum(0) - received).int()
        self.local = found._replace(tokens=found.tokens - begins[leg[found.tokens].long()])  # counted in their leg

    def leave(self, leg: Leg, x: Tensor, grad: Tensor | None = None) -> Coming:
        """[T, H] -> [R, H], or with a gradient beside them [R, 2, H]."""
        tokens = self._tokens[leg.sent]
        if grad is None:
            return self.group.exchange(x[tokens], leg.to, leg.of)
        both = x.new_empty(len(tokens), 2, x.shape[1])
        both[:, 0], both[:, 1] = x[tokens], grad[tokens]
        return self.group.exchange(both, leg.to, leg.of)

    def come(self, leg: Leg, rows: Tensor) -> Coming:
        """[R, ...] -> [S, ...]"""
        return self.group.exchange(rows, leg.of, leg.to)

    def together(self, back: Sequence[Tensor]) -> Tensor:
        """[S, H] by leg -> [T, H]: the sums of what has come back for each token."""
        return sum_rows([*back, back[0].new_zeros(1, back[0].shape[1])], self._slots, self._parts)

    def forget(self) -> None:
        """Gives up its tensors, after the backward: autograd's nodes, which know it, live as long as the loss."""
        del self.weights, self.local, self._slots, self._parts, self._tokens, self._goal, self._counts, self._received

    def by_expert(self, back: Tensor) -> Tensor:
        """[S, K] -> [T, K]: what has come back for each of a token's experts."""
        return back.gather(0, self._slots.gather(1, self._goal.long()).long())
