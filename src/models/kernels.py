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


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """PyTorch's own FlashAttention-2 for variable lengths; V is padded to the key's width, which it demands."""
    from torch.nn.attention.varlen import varlen_attn

    width = v.shape[-1]
    v = F.pad(v, (0, k.shape[-1] - width))
    causal = (-1, 0)  # window: everything before, nothing after
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=causal)
    assert isinstance(out, Tensor)
    return out[..., :width]


# From the fastest on; `auto` takes the first that can run. "sdpa" runs everywhere.
ATTENTION: dict[str, AttentionKernel] = {
    "flash_attn_4": attention_flash_4,
    "varlen": attention_varlen,
    "sdpa": attention_by_document,
}


def _problem(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the attention kernel cannot run there; None where it can."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs CUDA, the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16, the model is {dtype}"
    if name == "flash_attn_4":
        if torch.cuda.get_device_capability(device)[0] != 9:
            return f"it needs a Hopper GPU, this is {torch.cuda.get_device_name(device)}"
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
    problems = {candidate: _problem(candidate, device, dtype) for candidate in ATTENTION}
    if name == "auto":
        name = next(candidate for candidate, problem in problems.items() if problem is None)
        passed = "; ".join(f"not {candidate}: {problem}" for candidate, problem in problems.items() if problem)
        log.info("attention kernel: %s%s", name, f" ({passed})" if passed else "")
    elif problems[name]:
        raise ValueError(f"attention_kernel {name!r} cannot run: {problems[name]}. Use auto or sdpa.")
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
