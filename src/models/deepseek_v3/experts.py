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

Under expert parallelism a rank has a part of the shards, and the tokens are those that `expert_parallel.py` brings.
Where they are many more than a rank's share, a shard multiplies its rows in pieces and sums each token's at once.

Legend: T tokens, K experts a token, E experts, e experts of a shard, M rows of a shard, H hidden, I expert width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..kernels import grouped_mm, swiglu, swiglu_backward
from .channel import Channel
from .expert_parallel import ExpertParallelGroup, Journey
from .recompute import placeholder, recomputing, unhooked
from .route import Route, route
from .trip import Return, Send, Trip, TripInPieces


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    """A sum that is taken in fp32 where it has more than one part."""
    return more if total is None else total.float().add_(more)


class _ExpertShardFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        handle: Tensor,  # [M, H]
        weight: Tensor,  # [M] fp32, the routing weight of each row
        tokens: Tensor,  # [M], the token of each row; rows are sorted by leg and expert
        offsets: Tensor,  # [L, e] int32, where each expert's rows end in each leg
        gate_up_proj: Tensor,  # [e, 2I, H]
        down_proj: Tensor,  # [e, H, I]
        shard: "ExpertShard",
        channel: Channel,
    ) -> Tensor:  # [M, H]
        ctx.save_for_backward(weight, tokens, offsets)
        ctx.shard, ctx.channel = shard, channel
        out = placeholder(handle, *handle.shape)
        if recomputing():
            return out
        for rows, ends in channel.pieces(offsets, len(tokens)):
            assert channel.x is not None
            gate, up = grouped_mm(channel.x[tokens[rows]], gate_up_proj.mT, ends).chunk(2, -1)
            hidden = swiglu(gate, up, weight[rows])
            del gate, up
            out = channel.take(grouped_mm(hidden, down_proj.mT, ends), tokens[rows], out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        weight, tokens, offsets = ctx.saved_tensors
        channel: Channel = ctx.channel
        gate_up_proj, down_proj = ctx.shard.gate_up_proj, ctx.shard.down_proj  # gathered by ZeRO-3's backward hook
        trained_gate_up, trained_down = ctx.needs_input_grad[4:6]
        grad_rows, grad_weights = grad_out, list[Tensor]()
        of_gate_up: Tensor | None = None
        of_down: Tensor | None = None
        for piece, ends in channel.pieces(offsets, len(tokens)):
            assert channel.x is not None and channel.grad is not None
            rows, grad = channel.x[tokens[piece]], channel.grad[tokens[piece]]
            gate, up = grouped_mm(rows, gate_up_proj.mT, ends).chunk(2, -1)
            grad_hidden = grouped_mm(grad, down_proj, ends)
            grad_gate_up, hidden, grad_weight = swiglu_backward(gate, up, grad_hidden, weight[piece])
            assert hidden is not None and grad_weight is not None
            del gate, up, grad_hidden
            grad_rows = channel.take(grouped_mm(grad_gate_up, gate_up_proj, ends), tokens[piece], grad_rows)
            grad_weights.append(grad_weight)
            if trained_gate_up:
                of_gate_up = _plus(of_gate_up, grouped_mm(grad_gate_up.mT, rows, ends))
            if trained_down:
                of_down = _plus(of_down, grouped_mm(grad.mT, hidden, ends))
        # Without rows the weights' gradients are zero, but every rank must hand them to the reduction.
        if trained_gate_up and of_gate_up is None:
            of_gate_up = torch.zeros_like(gate_up_proj)
        if trained_down and of_down is None:
            of_down = torch.zeros_like(down_proj)
        # One after the other: sums of pieces are fp32, and the first is gone before the second is rounded.
        if of_gate_up is not None:
            of_gate_up = of_gate_up.to(gate_up_proj.dtype)
        if of_down is not None:
            of_down = of_down.to(down_proj.dtype)
        return (
            grad_rows,
            grad_weights[0] if len(grad_weights) == 1 else torch.cat([weight[:0], *grad_weights]),
            *(None, None),
            of_gate_up,
            of_down,
            *(None, None),
        )


class ExpertShard(nn.Module):
    """Some of a layer's experts, stacked; one ZeRO-3 leaf module.

    Every shard must be called on every rank that has it, in the same order, zero rows included: a rank that skips one
    leaves the others waiting in its gather.
    """

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))

    def forward(self, handle: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor, channel: Channel) -> Tensor:
        """handle [M, H], weight [M] fp32, tokens [M], offsets [L, e] int32 -> weighted expert outputs [M, H]."""
        return _ExpertShardFunction.apply(
            handle, weight, tokens, offsets, self.gate_up_proj, self.down_proj, self, channel
        )


class _Dispatch(Function):
    """A handle and the routing weights of each shard's rows; the backward sums each token's K rows.

    x: the tokens, or a handle of those that the channel waits for.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, route: Route, sizes: list[int], channel: Channel
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(route.slots, route.parts)
        ctx.channel = channel
        if not recomputing():
            channel.open(x)
        return *(placeholder(x, size, x.shape[1]) for size in sizes), *weights.reshape(-1)[route.order].split(sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slots, parts = ctx.saved_tensors
        rows, weights = grads[: len(grads) // 2], grads[len(grads) // 2 :]
        return ctx.channel.close(rows, slots, parts), ctx.channel.by_place(weights, slots), None, None, None


class _Combine(Function):
    """The shards' rows back to tokens: each token's K rows summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor | None, route: Route, channel: Channel, *rows: Tensor) -> Tensor:
        """x [T, H]: the tokens, which the shards' backward needs; None where they are sent again."""
        ctx.save_for_backward(*([] if x is None else [x]))
        ctx.sizes, ctx.channel = [len(r) for r in rows], channel
        if recomputing():
            return placeholder(rows[0], len(route.slots), rows[0].shape[1])
        return channel.close(rows, route.slots, route.parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors or (None,)
        ctx.channel.open(x, grad)
        return None, None, None, *(placeholder(grad, size, grad.shape[1]) for size in ctx.sizes)


class Experts(nn.ModuleDict):
    """All routed experts of a layer, as equal shards by their number; HF's expert j is row j % e of shard j // e."""

    def __init__(self, experts: int, experts_per_shard: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(
            {
                str(shard): ExpertShard(experts_per_shard, hidden_size, intermediate_size)
                for shard in range(experts // experts_per_shard)
            }
        )
        self.experts_per_shard = experts_per_shard
        self.group: ExpertParallelGroup | None = None
        self._most = 0.0
        # The parameters that other ranks have and this one has not, as they were built, by their names here.
        self.elsewhere: dict[str, nn.Parameter] = {}

    def share(self, group: ExpertParallelGroup, most: float) -> None:
        """Leaves to this rank its part of the shards, which the group's size must divide; most: as `most_received`."""
        self.group, self._most = group, most
        part = len(self) // group.size
        for shard in range(len(self)):
            if shard // part != group.rank:
                gone = self.pop(str(shard))
                self.elsewhere |= {f"{shard}.{name}": parameter for name, parameter in gone.named_parameters()}

    def route(self, chosen: Tensor) -> Route | Journey:
        """How the tokens get to the experts that they have chosen, [T, K]; the device goes on without waiting."""
        experts = len(self) * self.experts_per_shard
        if self.group is None:
            return route(chosen, experts, len(self))
        return Journey(chosen, experts, len(self), self.group, self._most)

    def set_out(self, x: Tensor, weights: Tensor, way: Route | Journey) -> Route | Trip:
        """Sends tokens [T, H] and weights fp32 [T, K] on the way that `route` returned; they travel on beside what the
        caller has the device compute next. The host waits here for the numbers of rows where they are to travel."""
        if isinstance(way, Route):
            return way
        way.settle(weights.detach())
        node: Any = x.grad_fn
        trip = (TripInPieces if way.in_pieces else Trip)(way, None if node is None else node._sequence_nr())
        if not recomputing():
            trip.depart(x.detach())
        return trip

    def forward(self, x: Tensor, weights: Tensor, way: Route | Trip) -> Tensor:
        """x [T, H], the chosen experts' weights fp32 [T, K] and what `set_out` returned for them -> [T, H]."""
        if torch.is_grad_enabled() and not x.requires_grad and any(p.requires_grad for p in self.parameters()):
            # Nothing below is trained, but ZeRO-3 gathers and releases a shard behind an input that has a gradient.
            x = x.detach().requires_grad_()
        if isinstance(way, Route):
            return self._run(x, weights, way, Channel(), x.detach())
        handle, of_received = Send.apply(x, weights, way)
        out = self._run(handle, of_received, way.journey.local, way, None)
        node: Any = out.grad_fn
        if node is not None and way.began is not None:
            node._set_sequence_nr(way.began)
        return Return.apply(out, x.detach(), way)

    def _run(self, x: Tensor, weights: Tensor, route: Route, channel: Channel, kept: Tensor | None) -> Tensor:
        """The experts that are here; kept: the tokens, to be saved for the backward."""
        sizes = route.sizes.read().view(len(self), -1).sum(1).tolist()  # the layer's one wait for the device
        offsets = route.offsets.view(len(self), -1, self.experts_per_shard)  # [shards, L, e]
        dispatched = _Dispatch.apply(x, weights, route, sizes, channel)
        handles, row_weights = dispatched[: len(self)], dispatched[len(self) :]
        outputs = [
            unhooked(shard)(handle, weight, tokens, ends, channel.of(number))
            for number, (shard, handle, weight, tokens, ends) in enumerate(
                zip(self.values(), handles, row_weights, route.tokens.split(sizes), offsets, strict=True)
            )
        ]
        return _Combine.apply(kept, route, channel, *outputs)
