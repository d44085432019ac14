"""Routed experts in shards that ZeRO-3 gathers twice a micro-step, not three times, two or three whole at once.

Activation checkpointing runs a layer's forward again in the backward pass, so ZeRO-3 would gather every expert for the
forward, the recompute and the backward, and autograd would hold views of the gathered weights of a whole layer. Here a
shard is one autograd function. It saves its input rows alone and keeps its parameters by reference (a parameter passed
to save_for_backward under checkpointing comes back as an alias of the released, empty tensor). It multiplies by
the routing weight before down_proj, so that nothing downstream needs its output, and computes gate_up again inside its
own backward. In the layer's recompute it therefore need not run at all: it saves its inputs again and gathers nothing.

Legend: T tokens, K experts a token, E experts, e experts of a shard, M rows of a shard, H hidden, I expert width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from ..kernels import grouped_mm, sum_rows, swiglu, swiglu_backward
from .recompute import recomputing


class _ExpertShardFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, H], sorted by expert
        weight: Tensor,  # [M] fp32, the routing weight of each row
        offsets: Tensor,  # [e] int32, where each expert's rows end
        gate_up_proj: Tensor,  # [e, 2I, H]
        down_proj: Tensor,  # [e, H, I]
        shard: "ExpertShard",
    ) -> Tensor:  # [M, H]
        ctx.save_for_backward(x, weight, offsets)
        ctx.shard = shard
        if recomputing():
            return x.new_empty(1).expand(x.shape)  # nobody reads it
        if len(x) == 0:
            return torch.empty_like(x)
        hidden = swiglu(grouped_mm(x, gate_up_proj.mT, offsets), weight)
        return grouped_mm(hidden, down_proj.mT, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        gate_up_proj, down_proj = ctx.shard.gate_up_proj, ctx.shard.down_proj  # gathered by ZeRO-3's backward hook
        trained_gate_up, trained_down = ctx.needs_input_grad[3:5]
        if len(x) == 0:  # the weights' gradients are zero, but every rank must hand them to the reduction
            return (
                torch.empty_like(x),
                torch.empty_like(weight),
                None,
                torch.zeros_like(gate_up_proj) if trained_gate_up else None,
                torch.zeros_like(down_proj) if trained_down else None,
                None,
            )
        grad = grad.contiguous()
        gate_up = grouped_mm(x, gate_up_proj.mT, offsets)
        grad_hidden = grouped_mm(grad, down_proj, offsets)
        grad_gate_up, hidden, grad_weight = swiglu_backward(gate_up, grad_hidden, weight)
        return (
            grouped_mm(grad_gate_up, gate_up_proj, offsets),
            grad_weight,
            None,
            grouped_mm(grad_gate_up.mT, x, offsets) if trained_gate_up else None,
            grouped_mm(grad.mT, hidden, offsets) if trained_down else None,
            None,
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

    def forward(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """x [M, H] sorted by expert, weight [M] fp32, offsets [e] int32 -> weighted expert outputs [M, H]."""
        return _ExpertShardFunction.apply(x, weight, offsets, self.gate_up_proj, self.down_proj, self)


class _Dispatch(Function):
    """Token rows in expert order, one tensor a shard; the backward sums each token's K rows in fp32, in fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, slots: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(slots)
        return x[tokens].split(sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        return sum_rows(torch.cat(grads), slots), None, None, None


class _Combine(Function):
    """The shards' rows back to tokens: each token's K rows summed in fp32, in fixed order."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: Tensor, *rows: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.sizes = [len(r) for r in rows]
        if recomputing():
            return rows[0].new_empty(1).expand(len(slots), rows[0].shape[1])  # nobody reads it
        return sum_rows(torch.cat(rows), slots)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, None, *grad[tokens].split(ctx.sizes)  # type: ignore[attr-defined]


class Experts(nn.ModuleList):
    """All routed experts of a layer, as equal shards; HF's expert j is row j % e of shard j // e."""

    def __init__(self, experts: int, experts_per_shard: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(
            ExpertShard(experts_per_shard, hidden_size, intermediate_size) for _ in range(experts // experts_per_shard)
        )
        self.experts = experts

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], chosen experts [T, K], their weights fp32 [T, K] -> [T, H]."""
        experts, top_k = self.experts, chosen.shape[1]
        order = chosen.reshape(-1).argsort(stable=True)  # rows of [T*K] in expert order
        tokens = order // top_k  # [T*K], the token of each row
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device=x.device)
        slots = slots.view(-1, top_k)  # [T, K], where each token's rows stand
        counts = torch.bincount(chosen.reshape(-1), minlength=experts).view(len(self), -1)  # [shards, e]
        sizes: list[int] = counts.sum(1).tolist()  # the layer's one host synchronisation
        offsets = counts.cumsum(1).int()

        rows = _Dispatch.apply(x, tokens, slots, sizes)
        row_weights = weights.reshape(-1)[order].split(sizes)
        # In the recompute past ZeRO-3's hooks, which belong to the module's call: the weights are not needed.
        shards = [shard.forward if recomputing() else shard for shard in self]
        outputs = [shard(*args) for shard, *args in zip(shards, rows, row_weights, offsets, strict=True)]
        return _Combine.apply(tokens, slots, *outputs)


def auto_experts_per_shard(experts: int) -> int:
    """An eighth of a layer's experts, as near as it divides: 32 of DeepSeek-V3's 256, 2.8 GB in bf16.

    Two or three shards are in memory at once, so a shard should be a small part of a layer; but a product over few
    rows is slow, so not too small a part.
    """
    return max(size for size in range(1, max(1, experts // 8) + 1) if experts % size == 0)
