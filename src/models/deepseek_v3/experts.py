"""Routed experts in shards that ZeRO-3 gathers twice a micro-step, not three times, two or three whole at once.

Activation checkpointing runs a layer's forward again in the backward pass, so ZeRO-3 would gather every expert for the
forward, the recompute and the backward, and autograd would hold views of the gathered weights of a whole layer. Here a
shard is one autograd function. It saves the layer's tokens, which all shards share, and keeps its parameters by
reference (a parameter passed to save_for_backward under checkpointing comes back as an alias of the released, empty
tensor). It multiplies by the routing weight before down_proj, so that nothing downstream needs its output, and computes
gate_up again inside its own backward. In the layer's recompute it therefore need not run at all: it saves its inputs
again and gathers nothing.

A shard picks its rows out of the tokens, and out of their gradient, itself: K copies of every token exist for one shard
at a time, never for the layer. Between dispatch, shards and combine autograd sees handles, which have the rows' shape
and no memory.

Legend: T tokens, K experts a token, E experts, e experts of a shard, M rows of a shard, H hidden, I expert width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from ..kernels import grouped_mm, sum_rows, swiglu, swiglu_backward
from .recompute import placeholder, recomputing, unhooked


class _Channel:
    """Carries the gradient of the layer's output [T, H] from the combine's backward to the shards'."""

    grad: Tensor | None = None


class _ExpertShardFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        handle: Tensor,  # [M, H]
        weight: Tensor,  # [M] fp32, the routing weight of each row
        x: Tensor,  # [T, H]
        tokens: Tensor,  # [M], the token of each row; rows are sorted by expert
        offsets: Tensor,  # [e] int32, where each expert's rows end
        gate_up_proj: Tensor,  # [e, 2I, H]
        down_proj: Tensor,  # [e, H, I]
        shard: "ExpertShard",
        channel: _Channel,
    ) -> Tensor:  # [M, H]
        ctx.save_for_backward(weight, x, tokens, offsets)
        ctx.shard, ctx.channel = shard, channel
        if recomputing() or len(tokens) == 0:
            return placeholder(x, len(tokens), x.shape[1])
        gate, up = grouped_mm(x[tokens], gate_up_proj.mT, offsets).chunk(2, -1)
        return grouped_mm(swiglu(gate, up, weight), down_proj.mT, offsets)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, tokens, offsets = ctx.saved_tensors
        gate_up_proj, down_proj = ctx.shard.gate_up_proj, ctx.shard.down_proj  # gathered by ZeRO-3's backward hook
        trained_gate_up, trained_down = ctx.needs_input_grad[5:7]
        if len(tokens) == 0:  # the weights' gradients are zero, but every rank must hand them to the reduction
            return (
                x.new_empty(0, x.shape[1]),
                torch.empty_like(weight),
                *(None, None, None),
                torch.zeros_like(gate_up_proj) if trained_gate_up else None,
                torch.zeros_like(down_proj) if trained_down else None,
                *(None, None),
            )
        rows, grad = x[tokens], ctx.channel.grad[tokens]
        gate, up = grouped_mm(rows, gate_up_proj.mT, offsets).chunk(2, -1)
        grad_hidden = grouped_mm(grad, down_proj, offsets)
        grad_gate_up, hidden, grad_weight = swiglu_backward(gate, up, grad_hidden, weight)
        assert hidden is not None
        del gate, up, grad_hidden
        return (
            grouped_mm(grad_gate_up, gate_up_proj, offsets),
            grad_weight,
            *(None, None, None),
            grouped_mm(grad_gate_up.mT, rows, offsets) if trained_gate_up else None,
            grouped_mm(grad.mT, hidden, offsets) if trained_down else None,
            *(None, None),
        )


class ExpertShard(nn.Module):
    """Some of a layer's experts, stacked; one ZeRO-3 leaf module.

    Every shard must be called on every rank, in the same order, zero rows included: a rank that skips one leaves the
    others waiting in its gather.
    """

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))

    def forward(
        self, handle: Tensor, weight: Tensor, x: Tensor, tokens: Tensor, offsets: Tensor, channel: _Channel
    ) -> Tensor:
        """handle [M, H], weight [M] fp32, x [T, H], tokens [M], offsets [e] int32 -> weighted expert outputs [M, H]."""
        return _ExpertShardFunction.apply(
            handle, weight, x, tokens, offsets, self.gate_up_proj, self.down_proj, self, channel
        )


class _Dispatch(Function):
    """A handle and the routing weights of each shard's rows; the backward sums each token's K rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        order: Tensor,
        slots: Tensor,
        parts: Tensor,
        sizes: list[int],
        channel: _Channel,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(slots, parts)
        ctx.channel = channel
        return *(placeholder(x, size, x.shape[1]) for size in sizes), *weights.reshape(-1)[order].split(sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slots, parts = ctx.saved_tensors
        ctx.channel.grad = None
        rows, weights = grads[: len(grads) // 2], grads[len(grads) // 2 :]
        return sum_rows(rows, slots, parts), torch.cat(weights)[slots], None, None, None, None, None


class _Combine(Function):
    """The shards' rows back to tokens: each token's K rows summed."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, parts: Tensor, channel: _Channel, *rows: Tensor) -> Tensor:
        ctx.sizes, ctx.channel = [len(r) for r in rows], channel
        if recomputing():
            return placeholder(rows[0], len(slots), rows[0].shape[1])
        return sum_rows(rows, slots, parts)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.channel.grad = grad.contiguous()  # type: ignore[attr-defined]
        return None, None, None, *(placeholder(grad, size, grad.shape[1]) for size in ctx.sizes)  # type: ignore[attr-defined]


class Experts(nn.ModuleList):
    """All routed experts of a layer, as equal shards; HF's expert j is row j % e of shard j // e."""

    def __init__(self, experts: int, experts_per_shard: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(
            ExpertShard(experts_per_shard, hidden_size, intermediate_size) for _ in range(experts // experts_per_shard)
        )
        self.experts = experts

    def route(self, chosen: Tensor) -> "Route":
        """Sorts the tokens by the experts that they have chosen, [T, K]; the device goes on without waiting."""
        experts_per_shard = self.experts // len(self)
        by_expert, order = chosen.reshape(-1).sort(stable=True)  # rows of [T*K] in expert order
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device=chosen.device)
        numbers = torch.arange(self.experts, device=chosen.device, dtype=by_expert.dtype)
        ends = torch.searchsorted(by_expert, numbers, right=True).view(len(self), -1)  # [shards, e]
        starts = F.pad(ends[:-1, -1], (1, 0))  # [shards]
        offsets = (ends - starts[:, None]).int()
        sizes = offsets[:, -1]
        if sizes.is_cuda:
            sizes = torch.empty(sizes.shape, dtype=sizes.dtype, pin_memory=True).copy_(sizes, non_blocking=True)
        arrived = torch.cuda.Event() if chosen.is_cuda else None
        if arrived is not None:
            arrived.record()
        top_k = chosen.shape[1]
        return Route(order, order // top_k, slots.view(-1, top_k), chosen // experts_per_shard, offsets, sizes, arrived)

    def forward(self, x: Tensor, weights: Tensor, route: "Route") -> Tensor:
        """x [T, H], the chosen experts' weights fp32 [T, K] and their route -> [T, H]."""
        if route.arrived is not None:
            route.arrived.synchronize()  # the layer's one wait for the device
        if torch.is_grad_enabled() and not x.requires_grad and any(p.requires_grad for p in self.parameters()):
            # Nothing below is trained, but ZeRO-3 gathers and releases a shard behind an input that has a gradient.
            x = x.detach().requires_grad_()
        sizes: list[int] = route.sizes.tolist()
        channel = _Channel()
        dispatched = _Dispatch.apply(x, weights, route.order, route.slots, route.parts, sizes, channel)
        handles, row_weights = dispatched[: len(self)], dispatched[len(self) :]
        outputs = [
            unhooked(shard)(handle, weight, x.detach(), tokens, ends, channel)
            for shard, handle, weight, tokens, ends in zip(
                self, handles, row_weights, route.tokens.split(sizes), route.offsets, strict=True
            )
        ]
        return _Combine.apply(route.slots, route.parts, channel, *outputs)


class Route(NamedTuple):
    """Which rows go where.

    order: [T*K], the places of [T, K] in expert order. tokens: [T*K], the token of each row in that order.
    slots: [T, K], where each token's rows stand. parts: [T, K], in which shard. offsets: int32 [shards, e], where each
    expert's rows end in its shard. sizes: int32 [shards] on the host, each shard's rows, there once `arrived` is past.
    """

    order: Tensor
    tokens: Tensor
    slots: Tensor
    parts: Tensor
    offsets: Tensor
    sizes: Tensor
    arrived: torch.cuda.Event | None
