"""The one door to kernels: what the model computes with, chosen once for the device and logged.

Each entry has a plain PyTorch path, which runs anywhere and which every fast path is tested against.

Legend: T tokens, A heads, M rows of one expert shard, e its experts, H hidden, I expert width, K experts a token.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

AttentionKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


def attention_by_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """PyTorch's scaled_dot_product_attention, one call a document; on CUDA it picks cuDNN for these head sizes."""
    outputs = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        # [n, A, D] -> [1, A, n, D]
        query, key, value = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        outputs.append(out.squeeze(0).transpose(0, 1))  # [n, A, Dv]
    return torch.cat(outputs)


def attention_flash_4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """FlashAttention-4's variable-length kernel, bf16 on Hopper; no padding of V to the key's width."""
    from flash_attn.cute import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=True,
    )
    return out[0] if isinstance(out, tuple) else out


ATTENTION: dict[str, AttentionKernel] = {"flash_attn_4": attention_flash_4, "sdpa": attention_by_document}


def _flash_4_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return f"it needs a Hopper GPU, the device is {device.type}"
    if dtype != torch.bfloat16:
        return f"it needs bfloat16, the model is {dtype}"
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return "the package flash-attn-4 is not installed (extra `gpu`)"
    return None


@functools.cache
def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The kernel called `name`, or for `auto` the fastest that this device, dtype and installation can run.

    Raises:
        ValueError: there is no kernel of that name, or it cannot run here; `auto` never raises.
    """
    if name not in ("auto", *ATTENTION):
        raise ValueError(f"attention_kernel {name!r} is unknown; it is one of auto, {', '.join(ATTENTION)}.")
    problem = _flash_4_problem(device, dtype)
    if name == "flash_attn_4" and problem:
        raise ValueError(f"attention_kernel 'flash_attn_4' cannot run: {problem}. Use auto or sdpa.")
    if name == "auto":
        name = "sdpa" if problem else "flash_attn_4"
        log.info("attention kernel: %s%s", name, f" (flash_attn_4: {problem})" if problem else "")
    return ATTENTION[name]


def grouped_mm(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Row group j of x [M, A], rows offsets[j-1] to offsets[j], times weights[j] of [e, A, B] -> [M, B].

    offsets [e] int32 ends at M. With two 2-D operands, [A, M] and [M, B] -> [e, A, B]: the weight gradient's form.
    """
    return F.grouped_mm(x, weights, offs=offsets)


def swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up * weight, computed in fp32: [M, 2I], [M] fp32 -> [M, I] in gate_up's dtype."""
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up * weight[:, None]).to(gate_up.dtype)


def swiglu_backward(gate_up: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `swiglu`: gate_up [M, 2I], grad [M, I], weight [M] -> grad of gate_up, swiglu's output, grad of weight [M]."""
    (gate, up), grad = gate_up.float().chunk(2, -1), grad.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_weight = (grad * silu * up).sum(-1)
    grad = grad * weight[:, None]
    grad_gate_up = torch.cat([grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu], -1)
    return grad_gate_up.to(gate_up.dtype), (silu * up * weight[:, None]).to(gate_up.dtype), grad_weight


def sum_rows(rows: Tensor, slots: Tensor) -> Tensor:
    """Each token's K rows, summed in fp32 in a fixed order (no atomics): [T*K, H], [T, K] -> [T, H]."""
    return rows[slots].sum(1, dtype=torch.float32).to(rows.dtype)
