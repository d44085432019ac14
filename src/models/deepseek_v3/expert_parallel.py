"""Expert parallelism: the ranks of a group share a layer's experts, and its tokens travel to them.

A token goes once to each rank that has any of its experts, with their numbers and weights; there its outputs are summed
in fp32, and one row comes back. So it is in the forward pass; a recomputation sends nothing. In the backward a token
goes again, beside its output's gradient, and one gradient comes back: what was received is never kept.

Legend: T this rank's tokens, K experts a token, H hidden, G ranks of the group, S rows sent, R rows received, M rows
that the experts here multiply.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels import sum_rows
from .recompute import placeholder, recomputing
from .route import HostCopy, Route, route


class ExpertParallelGroup(Protocol):
    """The ranks that share each layer's experts, in equal parts, in the order of the ranks."""

    rank: int
    size: int

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """rows [S, ...], sent[i] of them for rank i, in order -> [R, ...], received[i] of them from rank i.

        Without a gradient. Every rank of the group must call it, in the same order.
        """
        ...


class Journey:
    """How one layer's tokens get to their experts and back.

    The numbers of rows travel when it is made, so that the host need not wait for them at once; `settle` sends the
    experts' numbers and weights, once, and a recomputation finds them here.

    Args:
        chosen: int64 [T, K], each token's experts.
        experts, shards: that are on each rank.
    """

    local: Route  # of the received rows
    weights: Tensor  # fp32 [R, K], of the received rows' experts, any value for a spare place
    piece: int | None  # rows to be multiplied at once, where the experts here get many more than their share

    def __init__(self, chosen: Tensor, experts: int, shards: int, group: ExpertParallelGroup) -> None:
        self.group, self._experts, self._shards = group, experts, shards
        tokens, size = len(chosen), group.size
        self._chosen: Tensor | None = chosen
        self.ranks = chosen // experts  # [T, K]
        self._goes = torch.zeros(tokens, size, dtype=torch.bool, device=chosen.device).scatter_(1, self.ranks, True)
        shard = (chosen // (experts // shards)).flatten()
        rows = torch.zeros(size * shards, dtype=torch.int64, device=chosen.device)
        rows.scatter_add_(0, shard, torch.ones_like(shard))
        # For each rank: the rows that it gets, the tokens of this rank, the rows of its shards.
        counts = torch.cat([self._goes.sum(0)[:, None], rows.new_full((size, 1), tokens), rows.view(size, shards)], 1)
        ones = [1] * size
        self._counts = HostCopy(torch.stack([counts, group.exchange(counts, ones, ones)]))

    def settle(self, weights: Tensor) -> None:
        """Waits for the numbers of rows, the layer's one wait for the device, and tells the ranks what they get.

        weights: fp32 [T, K], of the chosen experts.
        """
        if self._chosen is None:
            return
        there, here = self._counts.read()
        self.sent, self.received = there[:, 0].tolist(), here[:, 0].tolist()
        tokens, top_k = self._chosen.shape
        goes, total = self._goes.T.reshape(-1), sum(self.sent)  # [G*T], by rank
        ends = goes.cumsum(0)
        places = torch.searchsorted(ends, torch.arange(1, total + 1, device=ends.device))  # [S]: whose row is the n-th
        self.tokens = places % max(1, tokens)  # [S]
        self.slots = torch.where(self._goes, (ends - 1).view(self.group.size, tokens).T, total)  # [T, G], S for none
        self.parts = (~self._goes).long()  # [T, G]
        first = places // max(1, tokens) * self._experts  # [S], the receiver's first expert
        numbers = self._chosen[self.tokens] - first[:, None]  # [S, K]
        elsewhere = (numbers < 0) | (numbers >= self._experts)
        outgoing = [numbers.masked_fill(elsewhere, self._experts).int(), weights[self.tokens].view(torch.int32)]
        incoming = self.group.exchange(torch.cat(outgoing, 1), self.sent, self.received)  # [R, 2K]
        sizes, share = here[:, 2:].sum(0), -(-int(here[:, 1].sum()) * top_k // self.group.size)
        self.local = route(incoming[:, :top_k].long(), self._experts, self._shards, sizes)
        self.weights = incoming[:, top_k:].contiguous().view(torch.float32)
        self.piece = share if sizes.sum() >= 2 * share > 0 else None
        self._chosen = None

    def go(self, rows: Tensor) -> Tensor:
        """[S, ...] -> [R, ...]"""
        return self.group.exchange(rows, self.sent, self.received)

    def come(self, rows: Tensor) -> Tensor:
        """[R, ...] -> [S, ...]"""
        return self.group.exchange(rows, self.received, self.sent)

    def come_together(self, rows: Tensor) -> Tensor:
        """[R, H] -> [T, H]: the sums of what comes back for each token."""
        back = self.come(rows)
        return sum_rows([back, back.new_zeros(1, back.shape[1])], self.slots, self.parts)


class Send(Function):
    """Tokens [T, H] and their experts' weights [T, K] -> what is received of all ranks, [R, H] and [R, K].

    The tokens go to `channel.x`, so that nothing else holds them, and on to autograd as a handle.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, journey: Journey, channel: Any) -> tuple[Tensor, Tensor]:
        ctx.journey = journey
        if not recomputing():
            channel.x = journey.go(x[journey.tokens])
        weights = journey.weights.clone()
        return placeholder(x, len(weights), x.shape[1]), weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        journey: Journey = ctx.journey
        grad_x, back = journey.come_together(grad), journey.come(grad_weights)
        rows = journey.slots.gather(1, journey.ranks)  # [T, K], where each expert's weight came back
        return grad_x, back.gather(0, rows), None, None


class Return(Function):
    """Outputs of the received rows [R, H] -> [T, H], each token's summed.

    The backward sends tokens and gradients; what is received of them goes to `channel.x` and on to autograd.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, journey: Journey, channel: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.journey, ctx.channel = journey, channel
        return placeholder(x, *x.shape) if recomputing() else journey.come_together(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        journey: Journey = ctx.journey
        both = x.new_empty(len(journey.tokens), 2, x.shape[1])  # [S, 2, H]
        both[:, 0], both[:, 1] = x[journey.tokens], grad[journey.tokens]
        ctx.channel.x, grad_out = journey.go(both).unbind(1)
        return grad_out, None, None, None
