"""What the model computes around its matrix products, each as plain PyTorch and, on CUDA, as one Triton kernel.

Legend: T tokens, A heads, M rows of one expert shard, e its experts, H hidden, I expert width, K experts a token,
V vocabulary, Dn, Dr, Dv a head's unrotated, rotary and value dimensions.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

# Triton comes with PyTorch's CUDA builds.
_TRITON = importlib.util.find_spec("triton") is not None


def _fast(x: Tensor) -> bool:
    return _TRITON and x.is_cuda


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor:
    """silu(gate) * up, times each row's weight, in fp32: [M, I] twice, [M] fp32 -> [M, I] in gate's dtype.

    gate and up may be column ranges of one tensor.
    """
    if _fast(gate):
        from . import triton_kernels

        return triton_kernels.swiglu(gate, up, weight)
    out = F.silu(gate.float()) * up.float()
    return (out if weight is None else out * weight[:, None]).to(gate.dtype)


def swiglu_backward(
    gate: Tensor, up: Tensor, grad: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of `swiglu`, for the output's gradient [M, I]: those of gate and up side by side [M, 2I].

    With weights also swiglu's output [M, I], which a caller that recomputes needs, and their gradient [M].
    """
    if _fast(gate):
        from . import triton_kernels

        return triton_kernels.swiglu_backward(gate, up, grad.contiguous(), weight)
    dtype = gate.dtype
    gate, up, grad = gate.float(), up.float(), grad.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    out = grad_weight = None
    if weight is not None:
        out = (silu * up * weight[:, None]).to(dtype)
        grad_weight = (grad * silu * up).sum(-1)
        grad = grad * weight[:, None]
    grad_gate_up = torch.cat([grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu], -1)
    return grad_gate_up.to(dtype), out, grad_weight


class _GatedUnit(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        return swiglu_backward(gate, up, grad)[0].chunk(2, -1)


def gated_unit(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up with a gradient: [T, I] twice -> [T, I]."""
    if _fast(gate):
        out: Tensor = _GatedUnit.apply(gate, up)
        return out
    return F.silu(gate) * up


def sum_rows(rows: Sequence[Tensor], slots: Tensor, parts: Tensor) -> Tensor:
    """Each token's K rows, summed in fp32 in a fixed order (no atomics) -> [T, H].

    rows: [M, H] each, T*K rows together, which the fast path reads where they are. slots, parts: integers [T, K], the
    place of a token's rows among all of them, and in which tensor of `rows` that is.
    """
    if _fast(slots):
        from . import triton_kernels

        return triton_kernels.sum_rows(rows, slots, parts)
    return torch.cat(list(rows))[slots].sum(1, dtype=torch.float32).to(rows[0].dtype)


def add_rows(total: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Adds rows [M, H] to those of fp32 `total` [T, H] that tokens [M] names, in a fixed order."""
    if total.is_cuda:  # sorts, and so has an order; index_add_ has none there
        total.index_put_((tokens.long(),), rows.float(), accumulate=True)
    else:
        total.index_add_(0, tokens, rows.float())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x0, x1), (x2, x3), ... of the last dimension: [T, A, Dr] -> [T, A, Dr], computed in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each [T, A, Dr/2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class _AssembleHeads(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, nope: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        from . import triton_kernels

        ctx.save_for_backward(cos, sin)
        ctx.nope = nope
        v = kv[..., nope:]
        k = triton_kernels.assemble_heads(q, kv, k_rope, cos, sin, nope, v.shape[-1])
        return q.view_as(q), k, v

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
        from . import triton_kernels

        cos, sin = ctx.saved_tensors
        d_q = d_q.contiguous()  # turned back in place: the attention made it and nobody else holds it
        d_kv, d_rope = triton_kernels.assemble_heads_backward(
            d_q, d_k.contiguous(), d_v.contiguous(), cos, sin, ctx.nope
        )
        return d_q, d_kv, d_rope, None, None, None


def assemble_heads(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, nope: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding, and keys and values as attention wants them.

    Args:
        q: [T, A, Dn + Dr], of which the fast path turns the last Dr in place.
        kv: [T, A, Dn + Dv].
        k_rope: [T, Dr], one rotary key for all heads.
        cos, sin: fp32 [T, Dr/2].
        nope: Dn.

    Returns:
        Queries and keys [T, A, Dn + Dr], values [T, A, Dv], in the fast path a view of `kv`.
    """
    if _fast(q):
        heads: tuple[Tensor, Tensor, Tensor] = _AssembleHeads.apply(q, kv, k_rope, cos, sin, nope)
        return heads
    q_nope, q_rope = q.tensor_split([nope], -1)
    k_nope, v = kv.tensor_split([nope], -1)
    k_rope = _rotate(k_rope[:, None], cos, sin).expand(-1, q.shape[1], -1)
    return torch.cat([q_nope, _rotate(q_rope, cos, sin)], -1), torch.cat([k_nope, k_rope], -1), v.contiguous()


def cross_entropy_rows(logits: Tensor, labels: Tensor, loss: Tensor, correct: Tensor, grad: Tensor | None) -> None:
    """Cross-entropy of each row, written into `loss`, `correct` and `grad`; `logits` may be used up.

    Args:
        logits: fp32 [T, V].
        labels: int64 [T].
        loss: fp32 [T], in nats.
        correct: bool [T], whether no logit is larger than the label's.
        grad: [T, V] of any dtype, softmax - one_hot; None where it is not wanted.
    """
    if _fast(logits):
        from . import triton_kernels

        triton_kernels.cross_entropy_rows(logits, labels, loss, correct, grad)
        return
    target = logits.gather(-1, labels[:, None])
    log_sum = logits.logsumexp(-1, keepdim=True)
    loss.copy_((log_sum - target)[:, 0])
    correct.copy_(logits.max(-1).values == target[:, 0])
    if grad is not None:
        softmax = logits.sub_(log_sum).exp_()  # in the logits' memory
        softmax.scatter_add_(-1, labels[:, None], softmax.new_full(target.shape, -1.0))
        grad.copy_(softmax)
