"""Causal attention over packed documents: which kernel, chosen once for the device and logged.

A kernel is differentiable when called, and offers its two halves besides, for a caller that keeps the output over a
recomputation. Where a library has no such halves, `backward` runs the forward once more.

Legend: T tokens, A heads, Dq width of queries and keys, Dv of values, D documents.
"""

import functools
import importlib.util
import logging
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from src.errors import UserError

log = logging.getLogger(__name__)


class Packing(NamedTuple):
    """cu_seqlens: int32 [D+1], the documents' bounds; max_seqlen: the longest; scale: on the scores."""

    cu_seqlens: Tensor
    max_seqlen: int
    scale: float


class AttentionKernel:
    """Queries and keys [T, A, Dq], values [T, A, Dv] -> [T, A, Dv]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        """The output and what else `backward` wants of it; without a graph."""
        return (self(q, k, v, packing),)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, results: tuple[Tensor, ...], packing: Packing
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v for that of the output; `results` is what `forward` returned."""
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            d_q, d_k, d_v = torch.autograd.grad(self(q, k, v, packing), (q, k, v), grad)
        return d_q, d_k, d_v

    def problem(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run there; None where it can."""
        if device.type != "cuda":
            return f"it needs CUDA, the device is {device.type}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it needs bfloat16, the model is {dtype}"
        return None


class FlashAttention4(AttentionKernel):
    """FlashAttention-4's variable-length kernels, bf16 on Hopper; no padding of V to the key's width."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        from flash_attn.cute import flash_attn_varlen_func

        out = flash_attn_varlen_func(q, k, v, **self._arguments(packing))
        return out[0] if isinstance(out, tuple) else out

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        from flash_attn.cute.interface import _flash_attn_fwd

        return _flash_attn_fwd(q, k, v, return_lse=True, **self._arguments(packing))[:2]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, results: tuple[Tensor, ...], packing: Packing
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_bwd

        out, log_sums = results
        return _flash_attn_bwd(q, k, v, out, grad.contiguous(), log_sums, **self._arguments(packing))[:3]

    @staticmethod
    def _arguments(packing: Packing) -> dict[str, object]:
        cu_seqlens, max_seqlen, scale = packing
        return {
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": max_seqlen,
            "max_seqlen_k": max_seqlen,
            "softmax_scale": scale,
            "causal": True,
        }

    def problem(self, device: torch.device, dtype: torch.dtype) -> str | None:
        problem = super().problem(device, dtype)
        if problem is None and torch.cuda.get_device_capability(device)[0] != 9:
            return f"it needs a Hopper GPU, this is {torch.cuda.get_device_name(device)}"
        if problem is None and importlib.util.find_spec("flash_attn") is None:
            return "the package flash-attn-4 is not installed (extra `gpu`)"
        if problem is None and importlib.util.find_spec("flash_attn.cute") is None:
            return "the package flash_attn that is installed is an older one; install the extra `gpu`"
        return problem


class VariableLength(AttentionKernel):
    """PyTorch's own FlashAttention-2 for variable lengths; V is padded to the key's width, which it demands."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        cu_seqlens, max_seqlen, scale = packing
        width = v.shape[-1]
        v = F.pad(v, (0, k.shape[-1] - width))
        causal = (-1, 0)  # window: everything before, nothing after
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=causal)
        assert isinstance(out, Tensor)
        return out[..., :width]


class ByDocument(AttentionKernel):
    """PyTorch's scaled_dot_product_attention, one call a document; on CUDA it picks cuDNN for these head sizes."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        outputs = []
        for start, stop in pairwise(packing.cu_seqlens.tolist()):
            # [n, A, D] -> [1, A, n, D]
            query, key, value = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=packing.scale)
            outputs.append(out.squeeze(0).transpose(0, 1))  # [n, A, Dv]
        return torch.cat(outputs)

    def problem(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None


# From the fastest on; `auto` takes the first that can run. "sdpa" runs everywhere.
ATTENTION: dict[str, AttentionKernel] = {
    "flash_attn_4": FlashAttention4(),
    "varlen": VariableLength(),
    "sdpa": ByDocument(),
}


@functools.cache
def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The kernel called `name`, or for `auto` the fastest that this device, dtype and installation can run.

    Raises:
        ValueError: there is no kernel of that name, or it cannot run here; `auto` never raises.
    """
    if name not in ("auto", *ATTENTION):
        raise UserError(f"attention_kernel {name!r} is unknown; it is one of auto, {', '.join(ATTENTION)}.")
    problems = {candidate: kernel.problem(device, dtype) for candidate, kernel in ATTENTION.items()}
    if name == "auto":
        name = next(candidate for candidate, problem in problems.items() if problem is None)
        passed = "; ".join(f"not {candidate}: {problem}" for candidate, problem in problems.items() if problem)
        log.info("attention kernel: %s%s", name, f" ({passed})" if passed and device.type == "cuda" else "")
    elif problems[name]:
        raise UserError(f"attention_kernel {name!r} cannot run: {problems[name]}. Use auto or sdpa.")
    return ATTENTION[name]
