"""Multi-head latent attention (MLA), sequence-parallel by its latents.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437, section 2.1.1.

MLA compresses a token to a query latent (q_lora_rank) and a key-value latent plus one rotary key (kv_lora_rank +
qk_rope_head_dim). Under SP these are gathered over the sequence, each rank projects up its own heads alone, attends
over the whole row, and one all-to-all brings the heads' outputs back to sequence shards. That moves a fraction of
what exchanging expanded queries, keys and values would, and the projections' work does not change.

Legend: T tokens of the whole row, H hidden, A heads, Dn = qk_nope_head_dim, Dr = qk_rope_head_dim, Dv = v_head_dim,
Rq = q_lora_rank (H where there is none), Rkv = kv_lora_rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers import DeepseekV3Config

from ..kernels import AttentionKernel, Packing, assemble_heads, resolve_attention
from .linear import KeptLinear
from .norm import RMSNorm
from .recompute import Kept, unhooked
from .rope import softmax_scale
from .row import RowGeometry
from .sp_group import SequenceParallelGroup, SingleProcess

# DeepSeek's q_a and kv_a norms keep this default whatever config.json's rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class HeadsLinear(nn.Linear):
    """A bias-free projection whose output rows belong to heads; computes those of some heads only.

    The weight is sliced inside forward, so that ZeRO-3's hooks on this module gather it first.
    """

    def forward(self, x: Tensor, start: int, stop: int) -> Tensor:  # type: ignore[override]
        """x [T, R], output rows start to stop -> [T, stop - start]."""
        return F.linear(x, self.weight[start:stop])


class _KeptAttention(Function):
    """An attention kernel whose output is kept over the layer's recomputation: a tenth of a step at 32k tokens."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, packing: Packing, kernel: AttentionKernel, kept: Kept
    ) -> Tensor:
        results = kept.once(lambda: kernel.forward(q, k, v, packing))
        ctx.save_for_backward(q, k, v, *results)
        ctx.packing, ctx.kernel = packing, kernel
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *results = ctx.saved_tensors
        return *ctx.kernel.backward(grad, q, k, v, tuple(results), ctx.packing), None, None, None


class Attention(nn.Module):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.heads = heads
        self.nope_dim, self.rope_dim, self.v_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.kv_rank = config.kv_lora_rank
        query_width = heads * (self.nope_dim + self.rope_dim)
        if config.q_lora_rank is None:
            self.q_proj = HeadsLinear(hidden, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = HeadsLinear(config.q_lora_rank, query_width, bias=False)
        self.compressed_queries = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_rank + self.rope_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, LATENT_NORM_EPS)
        self.kv_b_proj = HeadsLinear(self.kv_rank, heads * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = KeptLinear(heads * self.v_dim, hidden, bias=bias)
        self.scale = softmax_scale(config)
        # Set by DeepseekV3ForCausalLM for all layers at once.
        self.sp: SequenceParallelGroup = SingleProcess()
        self.kernel = "auto"
        self.kept: Kept | None = None  # None: computed again

    def forward(self, x: Tensor, row: RowGeometry) -> Tensor:
        """[T/SP, H] -> [T/SP, H]."""
        query_latent = self.q_a_layernorm(self.q_a_proj(x)) if self.compressed_queries else x  # [T/SP, Rq]
        kv_latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope_dim], -1)
        kv_latent = self.kv_a_layernorm(kv_latent)
        if self.sp.size > 1:
            widths = [query_latent.shape[-1], self.kv_rank, self.rope_dim]
            latents = self.sp.all_gather(torch.cat([query_latent, kv_latent, k_rope], -1))
            query_latent, kv_latent, k_rope = latents.split(widths, -1)  # each [T, .]

        heads = self.heads // self.sp.size
        first = self.sp.rank * heads
        q_dim, kv_dim = self.nope_dim + self.rope_dim, self.nope_dim + self.v_dim
        up_query = self.q_b_proj if self.compressed_queries else self.q_proj
        q = up_query(query_latent, first * q_dim, (first + heads) * q_dim).view(-1, heads, q_dim)
        kv = self.kv_b_proj(kv_latent, first * kv_dim, (first + heads) * kv_dim).view(-1, heads, kv_dim)

        q, k, v = assemble_heads(q, kv, k_rope, row.cos, row.sin, self.nope_dim)  # [T, A/SP, .]

        kernel = resolve_attention(self.kernel, x.device, x.dtype)
        packing = Packing(row.cu_seqlens, row.max_seqlen, self.scale)
        kept = self.kept if torch.is_grad_enabled() else None
        if kept is None:
            out = kernel(q, k, v, packing)  # [T, A/SP, Dv]
        else:
            kept.begin()
            out = _KeptAttention.apply(q, k, v, packing, kernel, kept)
        if self.sp.size > 1:
            out = out.reshape(self.sp.size, -1, heads, self.v_dim)  # [SP, T/SP, A/SP, Dv], block j for rank j
            out = self.sp.all_to_all(out).transpose(0, 1)  # [T/SP, SP, A/SP, Dv], all heads of this rank's tokens
        out = out.reshape(-1, self.heads * self.v_dim)
        project = self.o_proj if kept is None else unhooked(self.o_proj)
        projected: Tensor = project(out, kept)
        return projected
