"""Floating-point operations of the model, for MFU and for planning; the formulas stand here alone.

A multiplication with a matrix of N weights is 2N operations a token forward and 4N backward. Causal attention over a
document of n tokens is n^2 (Dq + Dv) operations a head forward (half of the full square's) and twice that backward.
Recomputation is not counted: MFU is about useful work.

`config` is a `Sizes` or transformers' DeepseekV3Config: both have config.json's names.
"""

from collections.abc import Iterable

from .sizes import Sizes, attention_weights, mlp_weights

FORWARD_AND_BACKWARD = 3


def layer_weights(config: Sizes, dense: bool) -> int:
    """Weights of one layer's matrices that a token is multiplied with: those of its K experts, not of all."""
    weights = sum(attention_weights(config).values()) + sum(mlp_weights(config, dense).values())
    return (
        weights
        if dense
        else weights + config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size
    )


def attention_flops(config: Sizes, lengths: Iterable[int]) -> int:
    """Of one layer's scores and values, forward, over documents of these lengths."""
    return _attention_flops(config, sum(n * n for n in lengths))


def _attention_flops(config: Sizes, squares: int) -> int:
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return int(squares * config.num_attention_heads * width)


def step_flops(config: Sizes, lengths: Iterable[int], targets: int, mtp: bool = False) -> int:
    """Forward and backward of documents of these lengths, of which `targets` tokens go through the head.

    Args:
        mtp: with the multi-token-prediction block, whose targets count in `targets`.
    """
    lengths = list(lengths)
    return packed_flops(config, sum(lengths), sum(n * n for n in lengths), targets, mtp)


def packed_flops(config: Sizes, tokens: int, squares: int, targets: int, mtp: bool = False) -> int:
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
