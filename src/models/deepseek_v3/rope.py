"""Rotary position embedding with YaRN, interleaved, as DeepSeek-V3 uses it.

Sources: RoPE, arXiv 2104.09864; YaRN, arXiv 2309.00071, section 3; DeepSeek's published modeling_deepseek.py.

Nothing here is a buffer: whatever casts or shards a model's buffers cannot round the frequencies.

Legend: T tokens, A heads, d rotary dimensions of a head (qk_rope_head_dim).
"""

import math

import torch
from torch import Tensor
from transformers import DeepseekV3Config


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: DeepseekV3Config) -> float:
    """1 / sqrt(qk head dimension), times mscale_all_dim's factor squared where YaRN is on."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
        scale *= _mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return float(scale)


def inverse_frequencies(config: DeepseekV3Config) -> tuple[Tensor, float]:
    """Angles a position for each pair, fp32 [d/2] on the CPU, and the factor on cos and sin (1 for DeepSeek-V3)."""
    rope, dim = config.rope_parameters, config.qk_rope_head_dim
    base = float(rope["rope_theta"])
    # "cpu" spelt out: a model may be built under torch.device("meta").
    wavelengths = base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)  # over 2 pi, in tokens
    frequencies = 1.0 / wavelengths  # in transformers' order of operations: not an ulp off
    if rope["rope_type"] == "default":
        return frequencies, 1.0

    factor, original = float(rope["factor"]), rope["original_max_position_embeddings"]

    def pair_that_turns(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(rope.get("beta_slow") or 1)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    kept = 1 - ramp.clamp(0, 1)  # 1: fast pairs keep their frequency, 0: slow ones are stretched by `factor`
    frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + frequencies * kept

    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        both = mscale and mscale_all_dim
        attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim) if both else _mscale(factor, 1.0)
    return frequencies, float(attention_factor)


def positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Each token's place in its own document: int64 [T] of cu_seqlens [D+1]."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    return index - starts[torch.searchsorted(starts, index, right=True) - 1]


def cos_sin(config: DeepseekV3Config, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """position_ids [T] -> cos and sin, each fp32 [T, d/2]."""
    frequencies, factor = inverse_frequencies(config)
    angles = position_ids[:, None].float() * frequencies.to(position_ids.device)
    return angles.cos() * factor, angles.sin() * factor
