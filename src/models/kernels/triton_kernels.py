"""Triton kernels for what lies between the matrix products: one pass over the data each, sums in fp32, no atomics.

They run for any sizes; what a kernel computes is said by the plain function of the same name in pointwise.py, and tests
compare the two. Legend as there; W a row's width.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _swiglu(gate, up, weight, out, gate_row, up_row, W, WEIGHTED: tl.constexpr, B: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    live = col < W
    g = tl.load(gate + row * gate_row + col, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + col, mask=live, other=0.0).to(tl.float32)
    y = g * tl.sigmoid(g) * u
    if WEIGHTED:
        y *= tl.load(weight + row)
    tl.store(out + row * W + col, y.to(out.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_backward(
    gate,
    up,
    grad,
    weight,
    d_gate,
    d_up,
    out,
    d_weight,
    gate_row,
    up_row,
    d_row,
    W,
    WEIGHTED: tl.constexpr,
    B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total, w = 0.0, 1.0
    if WEIGHTED:
        w = tl.load(weight + row)
    for start in range(0, W, B):
        col = start + tl.arange(0, B)
        live = col < W
        g = tl.load(gate + row * gate_row + col, mask=live, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_row + col, mask=live, other=0.0).to(tl.float32)
        d = tl.load(grad + row * W + col, mask=live, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        if WEIGHTED:
            total += tl.sum(d * g * s * u)
            tl.store(out + row * W + col, (g * s * u * w).to(out.dtype.element_ty), mask=live)
        d = d * w
        tl.store(d_gate + row * d_row + col, (d * u * (s + g * s * (1 - s))).to(d_gate.dtype.element_ty), mask=live)
        tl.store(d_up + row * d_row + col, (d * g * s).to(d_up.dtype.element_ty), mask=live)
    if WEIGHTED:
        tl.store(d_weight + row, total)


@triton.jit
def _sum_rows(bases, slots, parts, out, H, K: tl.constexpr, B: tl.constexpr):
    # Row r of part p is at bases[p] + r rows: the address of the part's first row, less the rows of the parts before.
    token, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    live, total = col < H, tl.zeros([B], tl.float32)
    for k in tl.static_range(K):
        base = tl.load(bases + tl.load(parts + token * K + k)).to(tl.pointer_type(out.dtype.element_ty))
        row = base + tl.load(slots + token * K + k).to(tl.int64) * H
        total += tl.load(row + col, mask=live, other=0.0).to(tl.float32)
    tl.store(out + token * H + col, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def _turn(even, odd, cos, sin):
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _turn_pairs(x, cos, sin, A: tl.constexpr, P: tl.constexpr):
    """Turns the pairs of x [A, 2P] by angles [1, P], in fp32."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (A, P, 2)))
    even, odd = _turn(even, odd, cos, sin)
    return tl.reshape(tl.join(even, odd), (A, 2 * P))


@triton.jit
def _assemble_heads(
    q, kv, k_rope, cos, sin, k, rope_row, A,
    DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    n, r, p = tl.arange(0, BN)[None, :], tl.arange(0, 2 * BR)[None, :], tl.arange(0, BR)[None, :]
    c = tl.load(cos + t * (DR // 2) + p, mask=p < DR // 2, other=0.0)
    s = tl.load(sin + t * (DR // 2) + p, mask=p < DR // 2, other=0.0)
    shared = _turn_pairs(tl.load(k_rope + t * rope_row + r, mask=r < DR, other=0.0), c, s, 1, BR)
    shared = tl.broadcast_to(shared, (BA, 2 * BR)).to(k.dtype.element_ty)
    for first in range(0, A, BA):
        a = (first + tl.arange(0, BA))[:, None]
        head, live_n, live_r = t * A + a, (a < A) & (n < DN), (a < A) & (r < DR)
        at = q + head * (DN + DR) + DN + r
        turned = _turn_pairs(tl.load(at, mask=live_r, other=0.0), c, s, BA, BR)
        tl.store(k + head * (DN + DR) + n, tl.load(kv + head * (DN + DV) + n, mask=live_n), mask=live_n)
        tl.store(k + head * (DN + DR) + DN + r, shared, mask=live_r)
        tl.store(at, turned.to(q.dtype.element_ty), mask=live_r)


@triton.jit
def _assemble_heads_backward(
    d_q, d_k, d_v, cos, sin, d_kv, d_rope, A,
    DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    n, v = tl.arange(0, BN)[None, :], tl.arange(0, BV)[None, :]
    r, p = tl.arange(0, 2 * BR)[None, :], tl.arange(0, BR)[None, :]
    c = tl.load(cos + t * (DR // 2) + p, mask=p < DR // 2, other=0.0)
    s = tl.load(sin + t * (DR // 2) + p, mask=p < DR // 2, other=0.0)
    total = tl.zeros([2 * BR], tl.float32)
    for first in range(0, A, BA):
        a = (first + tl.arange(0, BA))[:, None]
        head, live_r = t * A + a, (a < A) & (r < DR)
        live_n, live_v = (a < A) & (n < DN), (a < A) & (v < DV)
        at = d_q + head * (DN + DR) + DN + r
        turned = _turn_pairs(tl.load(at, mask=live_r, other=0.0), c, -s, BA, BR)
        total += tl.sum(tl.load(d_k + head * (DN + DR) + DN + r, mask=live_r, other=0.0).to(tl.float32), 0)
        tl.store(d_kv + head * (DN + DV) + n, tl.load(d_k + head * (DN + DR) + n, mask=live_n), mask=live_n)
        tl.store(d_kv + head * (DN + DV) + DN + v, tl.load(d_v + head * DV + v, mask=live_v), mask=live_v)
        tl.store(at, turned.to(d_q.dtype.element_ty), mask=live_r)
    turned = _turn_pairs(total[None, :], c, -s, 1, BR)
    tl.store(d_rope + t * DR + r, turned.to(d_rope.dtype.element_ty), mask=r < DR)


@triton.jit
def _cross_entropy_rows(logits, labels, loss, correct, grad, V, WITH_GRAD: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    largest, total = tl.full([B], -1e38, tl.float32), tl.zeros([B], tl.float32)
    for start in range(0, V, B):
        col = start + tl.arange(0, B)
        x = tl.load(logits + row * V + col, mask=col < V, other=-1e38)
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    top = tl.max(largest)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top)))
    target = tl.load(logits + row * V + label)
    tl.store(loss + row, log_sum - target)
    tl.store(correct + row, target == top)
    if WITH_GRAD:
        for start in range(0, V, B):
            col = start + tl.arange(0, B)
            x = tl.load(logits + row * V + col, mask=col < V, other=-1e38)
            p = tl.exp(x - log_sum) - tl.where(col == label, 1.0, 0.0)
            tl.store(grad + row * V + col, p.to(grad.dtype.element_ty), mask=col < V)


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None) -> Tensor:
    rows, width = gate.shape
    out = gate.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, 1024))
        _swiglu[grid](gate, up, weight, out, gate.stride(0), up.stride(0), width, weight is not None, 1024)
    return out


def swiglu_backward(
    gate: Tensor, up: Tensor, grad: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, width = gate.shape
    d_gate_up = gate.new_empty(rows, 2 * width)
    d_gate, d_up = d_gate_up.chunk(2, -1)
    out = None if weight is None else grad.new_empty(rows, width)
    d_weight = None if weight is None else torch.empty_like(weight)
    if rows:
        strides = gate.stride(0), up.stride(0), d_gate_up.stride(0)
        _swiglu_backward[(rows,)](
            gate, up, grad, weight, d_gate, d_up, out, d_weight, *strides, width, weight is not None, 1024
        )
    return d_gate_up, out, d_weight


def sum_rows(rows: Sequence[Tensor], slots: Tensor, parts: Tensor) -> Tensor:
    tokens, top_k = slots.shape
    width = rows[0].shape[1]
    out = rows[0].new_empty(tokens, width)
    bases, before = [], 0
    for part in rows:
        bases.append(part.data_ptr() - before * width * part.element_size())
        before += len(part)
    addresses = torch.tensor(bases, dtype=torch.int64)
    if slots.is_cuda:  # from pinned memory, since an ordinary copy would wait for the device
        addresses = addresses.pin_memory().to(slots.device, non_blocking=True)
    if tokens:
        _sum_rows[(tokens, triton.cdiv(width, 1024))](addresses, slots, parts, out, width, top_k, 1024)
    return out


def assemble_heads(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, nope: int, value: int) -> Tensor:
    tokens, heads, width = q.shape
    k = torch.empty_like(q)
    blocks = triton.next_power_of_2(nope), triton.next_power_of_2((width - nope) // 2), 8
    _assemble_heads[(tokens,)](q, kv, k_rope, cos, sin, k, k_rope.stride(0), heads, nope, width - nope, value, *blocks)
    return k


def assemble_heads_backward(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, nope: int
) -> tuple[Tensor, Tensor]:
    tokens, heads, width = d_q.shape
    value = d_v.shape[-1]
    d_kv = d_k.new_empty(tokens, heads, nope + value)
    d_rope = d_k.new_empty(tokens, width - nope)
    blocks = *(triton.next_power_of_2(n) for n in (nope, (width - nope) // 2, value)), 8
    _assemble_heads_backward[(tokens,)](
        d_q, d_k, d_v, cos, sin, d_kv, d_rope, heads, nope, width - nope, value, *blocks
    )
    return d_kv, d_rope


def cross_entropy_rows(logits: Tensor, labels: Tensor, loss: Tensor, correct: Tensor, grad: Tensor | None) -> None:
    rows, vocabulary = logits.shape
    if rows:
        _cross_entropy_rows[(rows,)](
            logits, labels, loss, correct, grad, vocabulary, grad is not None, 8192, num_warps=16
        )
