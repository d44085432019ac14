"""The tensors of a Hugging Face directory of weights, in BF16, FP8 or FP32."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from src.units import counted
from src.weights.fp8 import BLOCK, SCALE_SUFFIX, is_quantised, quantise, scale_shape
from src.weights.hf_reader import HFDirectorySource
from src.weights.hf_writer import OutputTensor
from src.weights.kept import Change
from src.weights.key_map import hf_shapes, mtp_copies, mtp_layer
from src.weights.side_files import architecture
from src.weights.source import CHUNK, WeightSource, chunks, raise_listed

Dtype = Literal["bf16", "fp8", "fp32"]


def output_tensors(
    trained: WeightSource,
    config: dict[str, Any],
    dtype: Dtype,
    base: WeightSource | None = None,
    beside: HFDirectorySource | None = None,
) -> list[OutputTensor]:
    """The tensors of an export, in file order.

    Args:
        trained: the weights in Hugging Face names; without those of the MTP block where that was not built.
        config: the content of config.json.
        dtype: of all weights but `e_score_correction_bias`, which is always F32.
        base: where the MTP block comes from if it is not in `trained`. Where its dtypes are those to be written, its
            tensors are copied byte for byte; for fp8 it is to be opened with dequantise=False.
        beside: what training started from; tensors then note how much of their change from it is kept, by dtype.

    Raises:
        ValueError: one list of the tensors that are missing, unexpected or mis-shaped.
    """
    model = architecture(config)
    layers = model.num_hidden_layers
    copies = mtp_copies(layers)
    have = dict.fromkeys(trained.names())
    built = any(mtp_layer(name, layers) for name in have)
    shapes = hf_shapes(model, mtp=built or base is not None)
    available = set(base.names()) if base is not None else set()

    tensors, problems = [], [f"unexpected: {name} {trained.shape(name)}" for name in have if name not in shapes]
    for name, shape in shapes.items():
        stored = copies.get(name, name)  # copies are written from the trained embedding and head
        source = base if not built and mtp_layer(stored, layers) else trained
        assert source is not None, "the MTP block is written only where it was built or a base is given"
        if stored not in (have if source is trained else available):
            problems.append(f"missing: {stored} {shape}" + ("" if source is trained else " in the base"))
        elif source.shape(stored) != shape:
            problems.append(f"shape of {stored}: {source.shape(stored)} instead of {shape}")
        else:
            change = _change(name, shape, dtype, trained, beside) if stored == name and source is trained else None
            tensors += _output(name, stored, source, shape, dtype, change)
    raise_listed(
        f"{counted(len(problems), 'tensor does', 'tensors do')} not fit config.json; check which model was trained:",
        problems,
    )
    return tensors


def _change(
    name: str, shape: tuple[int, ...], dtype: Dtype, trained: WeightSource, beside: HFDirectorySource | None
) -> Change | None:
    """The counter of how much is kept, if a tensor is rounded from fp32 masters and has this shape in the base."""
    if beside is None or _is_exact(name, dtype) or trained.dtype(name) != torch.float32:
        return None
    return Change(beside, name) if name in beside and beside.shape(name) == shape else None


def _is_exact(name: str, dtype: Dtype) -> bool:
    return dtype == "fp32" or name.endswith("e_score_correction_bias")


def _output(
    name: str, stored: str, source: WeightSource, shape: tuple[int, ...], dtype: Dtype, change: Change | None
) -> list[OutputTensor]:
    """The tensor `name`, read as `stored`: in FP8 values and scales, otherwise one."""
    notes = None if change is None else change.notes
    if dtype == "fp8" and is_quantised(name):
        scale = name + SCALE_SUFFIX
        if source.dtype(stored) == torch.float8_e4m3fn:
            return [
                OutputTensor(name, shape, torch.float8_e4m3fn, _Cast(source, stored, torch.float8_e4m3fn)),
                OutputTensor(
                    scale, scale_shape(shape), torch.float32, _Cast(source, stored + SCALE_SUFFIX, torch.float32)
                ),
            ]
        quantised = _Quantise(source, stored, change)
        return [
            OutputTensor(name, shape, torch.float8_e4m3fn, quantised, notes),
            OutputTensor(scale, scale_shape(shape), torch.float32, quantised.scales),
        ]
    written = torch.float32 if _is_exact(name, dtype) else torch.bfloat16
    return [OutputTensor(name, shape, written, _Cast(source, stored, written, change), notes)]


@dataclass
class _Cast:
    """A tensor's chunks in another dtype."""

    source: WeightSource
    name: str
    dtype: torch.dtype
    change: Change | None = None

    def __call__(self) -> Iterator[torch.Tensor]:
        if self.change is not None:
            self.change.start()
        for start, stop in chunks(0, torch.Size(self.source.shape(self.name)).numel()):
            values = self.source.read(self.name, start, stop)
            if self.change is not None:
                self.change.cast(values, start)
            yield values.to(self.dtype)


@dataclass
class _Quantise:
    """A weight's e4m3 chunks, bands of rows; the scales are kept from them, or recomputed in another file."""

    source: WeightSource
    name: str
    change: Change | None = None
    _scales: list[torch.Tensor] = field(default_factory=list)

    def __call__(self) -> Iterator[torch.Tensor]:
        rows, columns = self.source.shape(self.name)
        self._scales.clear()
        if self.change is not None:
            self.change.start()
        band = max(1, CHUNK // (BLOCK * columns)) * BLOCK
        for start, stop in chunks(0, rows, band):
            weight = self.source.read(self.name, start * columns, stop * columns).view(-1, columns)
            values, scale = quantise(weight) if self.change is None else self.change.quantise(weight, start)
            self._scales.append(scale.view(-1))
            yield values.view(-1)

    def scales(self) -> Iterator[torch.Tensor]:
        if not self._scales:
            for _ in self():
                pass
        yield torch.cat(self._scales)
        self._scales.clear()
