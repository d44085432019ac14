"""How fp32 masters become bf16 weights: to the nearest, or stochastically.

Rounded to the nearest, a weight on bf16's grid does not move before its master has moved by half a step, 2^-9 of its
size: at a rate of 2e-7 that takes hundreds of optimizer steps. Rounded stochastically, upwards with a probability that
grows with the distance to the value below, weights follow masters on average at once. Chance is a hash of seed,
optimizer step, parameter and the element's index in the whole parameter: the same on every layout, on the host and on
the device, and after a resume, and without any state.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from src.weights.key_map import place_in_layer

from .zero_parts import part_of

Kind = Literal["nearest", "stochastic"]

PIECE = 2**22  # elements at a time: 16 MiB of bits beside them
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)  # https://github.com/skeeto/hash-prospector, lowbias32


@dataclass(frozen=True)
class Rounding:
    """Rounds a range of a parameter's masters to its weights; what is representable stays as it is."""

    kind: Kind = "nearest"
    seed: int = 0

    def __call__(self, masters: Tensor, weights: Tensor, name: str, start: int, step: int) -> None:
        """Writes `weights`.

        Args:
            masters: fp32 [n], on the device of `weights`.
            weights: [n]; other dtypes than bf16 are rounded to the nearest.
            name: of the whole parameter; shards of experts by `place_in_layer`.
            start: the first element's index in it.
            step: optimizer steps that the masters have taken.
        """
        if self.kind == "nearest" or weights.dtype != torch.bfloat16:
            weights.copy_(masters)
            return
        for begin, end in _pieces(start, start + len(masters)):
            bits = _chance(self._key(name, step, begin >> 32), begin, end - begin, masters.device)
            # What chance adds to the half that bf16 cuts off carries into the half that it keeps.
            bits += masters[begin - start : end - start].view(torch.int32)
            weights[begin - start : end - start].view(torch.int16).copy_(bits.view(torch.int16).view(-1, 2)[:, 1])

    def _key(self, name: str, step: int, high: int) -> tuple[int, int]:
        digest = hashlib.sha256(f"{self.seed}:{step}:{name}:{high}".encode()).digest()
        return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:8], "little", signed=True)


NEAREST = Rounding()


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in ranges of at most PIECE elements, none of which crosses a multiple of 2^32."""
    while start < stop:
        end = min(stop, start + PIECE, ((start >> 32) + 1) << 32)
        yield start, end
        start = end


def _chance(key: tuple[int, int], start: int, count: int, device: torch.device) -> Tensor:
    """int32 [count], uniform in [0, 2^16): a hash of the lower 32 bits of the indices from `start` on."""
    first, second = (_signed(multiplier) for multiplier in _MULTIPLIERS)
    x = torch.arange(count, dtype=torch.int32, device=device).add_(_signed(start)).bitwise_xor_(key[0])
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(first)  # products wrap, shifts are made logical
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(key[1]).mul_(second)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).bitwise_and_(0xFFFF)


def _signed(number: int) -> int:
    """The int32 of a number's lower 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


@dataclass(frozen=True)
class _Place:
    """Elements [offset, offset + numel) of a flat tensor of masters are those from `start` on of the parameter."""

    offset: int
    numel: int
    name: str
    start: int


class FlatRounding:
    """Rounds ranges of the flat tensors in which an engine keeps this rank's masters, in its optimizer's step.

    Args:
        engine: that trains the model, at ZeRO stage 1 to 3.
        model: with names as in `src.weights.key_map`.
    """

    def __init__(self, engine: DeepSpeedEngine, model: nn.Module, rounding: Rounding) -> None:
        self._engine, self._rounding = engine, rounding
        self._places: dict[int, list[_Place]] = {}
        for name, parameter in model.named_parameters():
            part = part_of(engine, parameter) if parameter.requires_grad else None
            if part is not None:
                whole, first = place_of(name, parameter)
                place = _Place(part.offset, part.numel, whole, first + part.start)
                self._places.setdefault(id(part.flat), []).append(place)
        for places in self._places.values():
            places.sort(key=lambda place: place.offset)

    def __call__(self, flat: Tensor, start: int, masters: Tensor, weights: Tensor) -> None:
        """Writes the weights [n] of masters [n], elements [start, start + n) of `flat`; padding is left alone."""
        if self._rounding.kind == "nearest":
            weights.copy_(masters)
            return
        places, stop = self._places[id(flat)], start + len(masters)
        for place in places[max(0, bisect_right(places, start, key=lambda place: place.offset) - 1) :]:
            begin, end = max(start, place.offset), min(stop, place.offset + place.numel)
            if place.offset >= stop:
                break
            if begin < end:
                inside = slice(begin - start, end - start)
                first, step = place.start + begin - place.offset, self._engine.global_steps + 1
                self._rounding(masters[inside], weights[inside], place.name, first, step)


def place_of(name: str, parameter: Any) -> tuple[str, int]:
    """By which name and from which element on a parameter's elements are known whatever `experts_per_shard` is."""
    return place_in_layer(name, getattr(parameter, "ds_numel", parameter.numel()))
