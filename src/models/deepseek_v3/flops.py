"""Floating-point operations of the model, for MFU and for planning; the formulas stand here alone.

A multiplication with a matrix of N weights is 2N operations a token forward and 4N backward. Causal attention over a
document of n tokens is n^2 (Dq + Dv) operations a head forward (half of the full square's) and twice that backward.
Recomputation is not counted: MFU is about useful work.
"""

from collections.abc import Iterable

from transformers import DeepseekV3Config

FORWARD_AND_BACKWARD = 3


def layer_weights(config: DeepseekV3Config, dense: bool) -> int:
    """Weights of one layer's matrices that a token is multiplied with: those of its K experts, not of all."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    up_query = hidden * query if config.q_lora_rank is None else config.q_lora_rank * (hidden + query)
    attention = (
        up_query
        + hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )
    if dense:
        return int(attention + 3 * hidden * config.intermediate_size)
    experts = config.num_experts_per_tok + config.n_shared_experts
    return int(attention + 3 * hidden * config.moe_intermediate_size * experts + hidden * config.n_routed_experts)


def attention_flops(config: DeepseekV3Config, lengths: Iterable[int]) -> int:
    """Of one layer's scores and values, forward, over documents of these lengths."""
    return _attention_flops(config, sum(n * n for n in lengths))


def _attention_flops(config: DeepseekV3Config, squares: int) -> int:
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return int(squares * config.num_attention_heads * width)


def step_flops(config: DeepseekV3Config, lengths: Iterable[int], targets: int, mtp: bool = False) -> int:
    """Forward and backward of documents of these lengths, of which `targets` tokens go through the head.

    Args:
        mtp: with the multi-token-prediction block, whose targets count in `targets`.
    """
    lengths = list(lengths)
    return packed_flops(config, sum(lengths), sum(n * n for n in lengths), targets, mtp)


def packed_flops(config: DeepseekV3Config, tokens: int, squares: int, targets: int, mtp: bool = False) -> int:
    """`step_flops` of documents whose lengths add up to `tokens` and their squares to `squares`."""
    layers = config.num_hidden_layers
    dense = min(config.first_k_dense_replace, layers)
    weights = dense * layer_weights(config, True) + (layers - dense) * layer_weights(config, False)
    if mtp:
        weights += layer_weights(config, layers < config.first_k_dense_replace) + 2 * config.hidden_size**2
    forward = (
        2 * tokens * weights
        + (layers + mtp) * _attention_flops(config, squares)
        + 2 * targets * config.hidden_size * config.vocab_size
    )
    return FORWARD_AND_BACKWARD * int(forward)
