"""Stochastic rounding against integers of Python and against what probability asks of it."""

import hashlib

import pytest
import torch

from src.strategies import rounding
from src.strategies.rounding import Rounding

SEED, STEP, NAME = 5, 7, "model.norm.weight"


def spelled_out(bits: int, index: int) -> int:
    """bf16 bits of an fp32 master's bits: lowbias32 on the index, with a key of seed, step, parameter and its top."""
    mask = 2**32 - 1
    key = hashlib.sha256(f"{SEED}:{STEP}:{NAME}:{index >> 32}".encode()).digest()
    x = index & mask ^ int.from_bytes(key[:4], "little")
    x = (x ^ x >> 16) * 0x7FEB352D & mask
    x = ((x ^ x >> 15) ^ int.from_bytes(key[4:8], "little")) * 0x846CA68B & mask
    x = (x ^ x >> 16) & 0xFFFF
    return (bits + x & mask) >> 16


def rounded(masters: torch.Tensor, start: int = 0, step: int = STEP, seed: int = SEED) -> torch.Tensor:
    weights = torch.full_like(masters, torch.nan, dtype=torch.bfloat16)
    Rounding("stochastic", seed)(masters, weights, NAME, start, step)
    return weights


@pytest.mark.parametrize("start", [0, 1000, 2**31 - 700, 2**32 - 700, 5 * 2**32 + 12345])
def test_bits_are_those_of_the_formula(start: int) -> None:
    torch.manual_seed(0)
    masters = torch.randn(1500) * torch.logspace(-6, 3, 1500)
    bits = [number & (2**32 - 1) for number in masters.view(torch.int32).tolist()]
    expected = [spelled_out(number, start + index) for index, number in enumerate(bits)]
    found = [number & 0xFFFF for number in rounded(masters, start).view(torch.int16).tolist()]
    assert found == expected


def test_any_cut_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    masters, start = torch.randn(5000), 2**32 - 2000
    whole = rounded(masters, start)
    monkeypatch.setattr(rounding, "PIECE", 170)
    parts = [
        rounded(part, start + begin)
        for begin, part in zip((0, 1, 700, 3100), masters.split([1, 699, 2400, 1900]), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_what_is_representable_stays() -> None:
    values = torch.randn(10_000).bfloat16().float()
    values[:4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    assert torch.equal(rounded(values).float(), values)


@pytest.mark.parametrize("value", [0.1, -0.1, 1.001, 3.3e-5, -127.77, 1e-39])
def test_the_mean_is_the_master_and_only_its_neighbours_come(value: float) -> None:
    draws, master = 40_000, torch.tensor(value).double()
    found = rounded(torch.full((draws,), value))
    below, above = found.double().unique()
    bits = found.view(torch.int16).unique()
    assert below < master < above and len(bits) == 2 and bits[1] - bits[0] == 1
    up = (master - below) / (above - below)
    # Five deviations of a binomial mean.
    assert abs(found.double().mean() - master) < 5 * (above - below) * (up * (1 - up) / draws).sqrt()


def test_steps_seeds_and_neighbours_are_independent() -> None:
    masters = torch.full((40_000,), 1 + 2**-8)  # half-way between two values
    up = [(rounded(masters, step=step, seed=seed) > 1).float() for step, seed in ((1, 0), (2, 0), (1, 1))]
    for a in up:
        assert abs(float(a.mean()) - 0.5) < 5 * 0.5 / 200
        for lag in (1, 2, 64, 4096):
            assert abs(float((a[lag:] * a[:-lag]).mean()) - 0.25) < 5 * 0.44 / 180
    for a, b in ((up[0], up[1]), (up[0], up[2])):
        assert abs(float((a * b).mean()) - 0.25) < 5 * 0.44 / 200


def test_nearest_and_other_dtypes_are_copied() -> None:
    masters = torch.randn(1000)
    nearest, whole = torch.empty(1000, dtype=torch.bfloat16), torch.empty(1000)
    Rounding()(masters, nearest, NAME, 0, 1)
    Rounding("stochastic")(masters, whole, NAME, 0, 1)
    assert torch.equal(nearest, masters.bfloat16()) and torch.equal(whole, masters)


@pytest.mark.gpu
def test_the_device_rounds_as_the_host() -> None:
    masters, start = torch.randn(1_000_000), 2**32 - 500_000
    assert torch.equal(rounded(masters.cuda(), start).cpu(), rounded(masters, start))
