"""DeepSeek-V3's FP8 weights: e4m3 with one fp32 scale per block of 128 x 128, value = weight x scale.

DeepSeek-V3 technical report, section 3.3; the published layout is `X.weight` [R, C] in float8_e4m3fn and
`X.weight_scale_inv` [ceil(R/128), ceil(C/128)] in fp32. Blocks at the edges count as padded with zeros.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}

_E4M3_MAX = 448.0
_QUANTISED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.(shared_experts\.|experts\.\d+\.)?(gate|up|down)_proj)\.weight"
)


def is_quantised(name: str) -> bool:
    """Whether the published FP8 checkpoints hold this tensor in FP8: the projections of attention and MLPs.

    Embedding, head, norms, router and the MTP block's eh_proj stay in BF16, the correction bias in F32.
    """
    return _QUANTISED.fullmatch(name) is not None


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = (BLOCK, BLOCK)) -> tuple[int, int]:
    """[R, C] -> [ceil(R / block rows), ceil(C / block columns)]."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def quantise(weight: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a weight, or a band of its rows that starts at a multiple of 128.

    Args:
        weight: [R, C], any float dtype.
        scale: [ceil(R/128), ceil(C/128)] fp32; by default each block's largest magnitude / 448, or 1 for a block of
            zeros.

    Returns:
        The e4m3 values [R, C] and the scales.
    """
    rows, columns = weight.shape
    blocks = _blocks(weight)
    if scale is None:
        largest = blocks.abs().amax(dim=(1, 3))
        scale = torch.where(largest > 0, largest / _E4M3_MAX, 1.0)
    values = (blocks / scale[:, None, :, None]).clamp_(-_E4M3_MAX, _E4M3_MAX)  # a quotient may round past 448
    padded = values.view(blocks.shape[0] * BLOCK, -1)
    return padded[:rows, :columns].to(torch.float8_e4m3fn), scale


def quantise_change(
    weight: torch.Tensor, base: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantises a weight, block by block, so that most of its change from `base` survives.

    A block takes its own scale or the base's, whichever gives the smaller error |r - d|, where d = weight - base and r
    is the change after quantising. With the base's scale, unchanged values stay exact; after large changes the weight's
    largest value may be out of that scale's range.

    Args:
        weight: [R, C] fp32, as `quantise` takes it.
        base: [R, C] fp32.
        scale: the base's, if it is in FP8; by default `quantise`'s of the base.

    Returns:
        As `quantise`, and r [R, C] fp32, the change beside the base in its own scales.
    """
    base_values, base_scale = quantise(base, scale)
    before = _whole(base_values, base_scale)
    own, kept = quantise(weight), quantise(weight, base_scale)
    own_change, kept_change = _whole(*own) - before, _whole(*kept) - before
    own_error, kept_error = (
        _blocks(change - (weight - base)).square().sum(dim=(1, 3)) for change in (own_change, kept_change)
    )
    better = own_error < kept_error  # [ceil(R/128), ceil(C/128)]
    elements = better.repeat_interleave(BLOCK, 0)[: len(weight)].repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    values = torch.where(elements, own[0].view(torch.uint8), kept[0].view(torch.uint8)).view(torch.float8_e4m3fn)
    return values, torch.where(better, own[1], kept[1]), torch.where(elements, own_change, kept_change)


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    """[R, C] -> fp32 [ceil(R/128), 128, ceil(C/128), 128], padded with zeros."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def _whole(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantises [R, C]."""
    return dequantise(values.reshape(-1), scale, 0, values.shape[1]).view(values.shape)


def dequantise(
    values: torch.Tensor, scale: torch.Tensor, start: int, columns: int, block: tuple[int, int] = (BLOCK, BLOCK)
) -> torch.Tensor:
    """Dequantises a flat range of a weight [R, C].

    Args:
        values: [n] e4m3, the elements [start, start + n) of the flattened weight.
        scale: the rows of the scales that cover the range, the first being that of element `start`.
        start: where the range begins.
        columns: C.
        block: rows and columns that share a scale.

    Returns:
        [n] fp32.
    """
    first, last = start // columns, (start + values.numel() - 1) // columns
    # Whole rows, so that scales are found by row and column; fp32 too where a model is built with another default.
    aligned = torch.empty((last - first + 1) * columns, dtype=torch.float32)
    inside = aligned[start - first * columns :][: values.numel()]
    inside.copy_(values)
    rows = scale[torch.arange(first, last + 1) // block[0] - first // block[0]]  # [rows, ceil(C / block columns)]
    whole = columns // block[1]
    matrix = aligned.view(-1, columns)
    matrix[:, : whole * block[1]].unflatten(1, (whole, block[1])).mul_(rows[:, :whole, None])
    matrix[:, whole * block[1] :].mul_(rows[:, whole:])  # the edge's block, if there is one
    return inside
