"""Ranges of block-quantised weights against dequantising them whole, by a loop over the blocks."""

import pytest
import torch

from src.weights.fp8 import dequantise, is_quantised, quantise, scale_shape
from tests.checkpoints.tiny import dequantise_whole, ranges


@pytest.mark.parametrize("shape", [(128, 128), (272, 160), (5, 300), (300, 5), (129, 257)])
def test_ranges_are_those_of_the_whole(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape(shape)) + 0.5
    expected = dequantise_whole(values, scale).view(-1)
    for start, stop in ranges(shape, count=30):
        if start == stop:
            continue
        first, last = start // shape[1] // 128, (stop - 1) // shape[1] // 128
        part = dequantise(values.view(-1)[start:stop], scale[first : last + 1], start, shape[1])
        assert torch.equal(part, expected[start:stop]), (start, stop)


@pytest.mark.parametrize("shape", [(128, 128), (272, 160), (1, 1), (300, 5)])
def test_quantised_weights_come_back(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None]
    weight[0, 0] = weight.abs().max() * 2  # an outlier, in one block alone
    values, scale = quantise(weight)
    assert values.shape == weight.shape and scale.shape == scale_shape(shape)
    # e4m3 has 3 bits of mantissa: half a step is 1/16 of a normal number, and 2^-10 of the scale below those.
    scales = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    bound = torch.maximum(weight.abs() / 16, scales * 2**-10) * 1.0001
    assert ((dequantise_whole(values, scale) - weight).abs() <= bound).all()


def test_each_block_uses_the_whole_range_and_zeros_stay_zeros() -> None:
    weight = torch.zeros(256, 256)
    weight[:128, :128] = torch.linspace(-3.0, 2.0, 128)
    weight[128:, 128:] = 1e-20
    values, scale = quantise(weight)
    assert values.float()[:128, :128].min() == -448
    assert scale[0, 1] == scale[1, 0] == 1
    assert (dequantise_whole(values, scale)[128:, :128] == 0).all()
    torch.testing.assert_close(dequantise_whole(values, scale)[128:, 128:], weight[128:, 128:])


def test_quantising_twice_changes_nothing() -> None:
    torch.manual_seed(0)
    once = dequantise_whole(*quantise(torch.randn(272, 160)))
    torch.testing.assert_close(dequantise_whole(*quantise(once)), once, rtol=1e-6, atol=0)


def test_a_band_of_rows_is_quantised_as_in_the_whole() -> None:
    torch.manual_seed(0)
    weight = torch.randn(400, 160)
    values, scale = quantise(weight)
    band_values, band_scale = quantise(weight[128:384])
    assert torch.equal(band_values.view(torch.uint8), values[128:384].view(torch.uint8))
    assert torch.equal(band_scale, scale[1:3])


@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.3.mlp.experts.17.down_proj.weight", True),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", True),
        ("model.layers.0.mlp.up_proj.weight", True),
        ("model.layers.61.self_attn.o_proj.weight", True),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.3.self_attn.q_a_layernorm.weight", False),
        ("model.layers.3.self_attn.o_proj.bias", False),
        ("model.layers.61.eh_proj.weight", False),
        ("model.layers.61.shared_head.head.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_which_weights_are_quantised(name: str, quantised: bool) -> None:
    assert is_quantised(name) is quantised
