"""Loads a source into sinks, in place: each rank reads the ranges that it keeps, without gather or broadcast.

Under ZeRO-3 rank r of n keeps the elements [r*p, (r+1)*p) of each flattened parameter, p = ceil(numel / n), in
`param.ds_tensor`; the last partitions end in padding (deepspeed/runtime/zero/partition_parameters.py, 0.19.8,
`Init._partition_param`). Other parameters and all buffers are filled whole. `load` is for a model before
`deepspeed.initialize`, which copies the fp32 masters from these weights; `fill` is the loop that a resumed run uses
too, with masters and moments as sinks.

bf16 is the upper half of fp32. To give masters the source's exact fp32 values and still read each byte once, a load for
training writes the upper halves into the parameters and returns the lower ones, two bytes per element in host memory,
until the masters exist (src/strategies/masters.py).
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from src.units import counted
from src.weights.key_map import StackedExperts, mtp_copies, mtp_layer
from src.weights.random_source import RandomSource
from src.weights.source import WeightSource, chunks, raise_listed

log = logging.getLogger(__name__)

# With CHUNK this bounds the memory besides the partition: 8 x (16 MiB as stored + 32 MiB dequantised).
THREADS = 8


@dataclass(frozen=True)
class Sink:
    """A destination [n], on any device, for elements [start, start + n) of the flattened tensor.

    With `low`, int16 [n], a bf16 destination takes the upper halves of fp32 values, `low` the lower ones.
    """

    source: WeightSource
    name: str
    destination: torch.Tensor
    start: int
    low: torch.Tensor | None = None

    def take(self, begin: int, end: int) -> int:
        """Reads elements [begin, end) of the destination; returns their bytes there."""
        part = self.destination[begin:end]
        values = self.source.read(self.name, self.start + begin, self.start + end)
        if self.low is None:
            part.copy_(values)
        else:
            both = halves(values.float())
            self.low[begin:end].copy_(both[:, 0])
            part.view(torch.int16).copy_(both[:, 1])
        return part.nbytes


def halves(values: torch.Tensor) -> torch.Tensor:
    """fp32 [n] as int16 [n, 2], a view: the lower half of each element's bits, and the upper one, its bf16 if cut."""
    return values.view(torch.int16).view(-1, 2)


def load(
    model: nn.Module,
    source: WeightSource,
    *,
    num_hidden_layers: int,
    lower_halves: bool = False,
    threads: int = THREADS,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Fills the parameters and persistent buffers of `model` from `source`.

    Args:
        model: plain parameters or ZeRO-3 partitions, on any device but meta; names as in `src.weights.key_map`.
        source: in Hugging Face names; each value is cast to the parameter's dtype as it is copied.
        num_hidden_layers: layers from this id on are the MTP block, which only `source` may have.
        lower_halves: cut fp32 values of trained bf16 parameters instead of rounding them, and return what is cut off.
        threads: reads in flight.
        progress: a bar with bytes per second, on rank 0.

    Returns:
        With `lower_halves`, by name, int16 [n] in host memory: of this rank's partition without padding, or of the
        whole parameter if it is not partitioned. Only for parameters whose values in `source` are fp32.

    Raises:
        ValueError: one list of all tensors that are missing, unexpected or of another shape, and of destinations that
            cannot take them, before anything is read.
    """
    tensors = persistent(model)
    copies, builds_mtp = mtp_copies(num_hidden_layers), any(mtp_layer(name, num_hidden_layers) for name in tensors)

    def unneeded(name: str) -> bool:
        return (
            name in copies
            or name.endswith("rotary_emb.inv_freq")
            or (not builds_mtp and mtp_layer(name, num_hidden_layers))
        )

    view, problems = stacked_view(source, tensors | elsewhere(model), unneeded)
    if not problems:  # compares destinations with their sources, which must exist
        problems = unfit(tensors, view)
    many = counted(len(problems), "tensor does", "tensors do")
    raise_listed(f"{many} not fit the model; check config.json against the weights:", problems)
    sinks = [sink_of(view, name, tensor) for name, tensor in tensors.items()]
    if lower_halves:
        sinks = [_cut(sink) if tensors[sink.name].requires_grad else sink for sink in sinks]
    fill(sinks, "Random weights" if isinstance(source, RandomSource) else "Loading weights", threads, progress)
    return {sink.name: sink.low for sink in sinks if sink.low is not None}


def _cut(sink: Sink) -> Sink:
    """The sink with room for lower halves, if its values have any that its destination cannot hold."""
    if sink.destination.dtype != torch.bfloat16 or sink.source.dtype(sink.name) != torch.float32:
        return sink
    return replace(sink, low=torch.empty(len(sink.destination), dtype=torch.int16))


def fill(sinks: list[Sink], what: str, threads: int = THREADS, progress: bool = True) -> None:
    """Copies with `threads` reads in flight; casts each chunk as it is copied; rank 0 shows a bar titled `what`."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    total = sum(sink.destination.nbytes for sink in sinks)
    started = time.monotonic()

    def copy(job: tuple[Sink, int, int]) -> int:
        sink, begin, end = job
        return sink.take(begin, end)

    with (
        tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=not progress or rank != 0 or None) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        for nbytes in pool.map(copy, _jobs(sinks)):
            bar.update(nbytes)
    if rank == 0:
        seconds = time.monotonic() - started
        log.info(
            "%s: %.2f GB on rank 0 in %.1f s (%.2f GB/s)", what, total / 1e9, seconds, total / 1e9 / max(seconds, 1e-9)
        )


def persistent(model: nn.Module) -> dict[str, Any]:
    """Parameters, partitioned or not, and the buffers that a checkpoint holds, by name."""
    kept = model.state_dict().keys()  # under ZeRO-3 the values are placeholders; the keys are right
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def elsewhere(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters that only other ranks have (`Experts.elsewhere`), without values, by name."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        for name, parameter in getattr(module, "elsewhere", {}).items()
    }


def stacked_view(
    source: WeightSource, tensors: dict[str, Any], unneeded: Callable[[str], bool] = lambda name: False
) -> tuple[StackedExperts, list[str]]:
    """`source` under the names and stacking of `tensors`, and what is missing, unexpected or mis-shaped in it.

    A tensor of the source is unexpected if it is neither in `tensors` nor `unneeded`.
    """
    view = StackedExperts(source, {name: _shape(tensor) for name, tensor in tensors.items()})
    needed = {piece.name: piece.shape for pieces in view.pieces.values() for piece in pieces}
    offered = dict.fromkeys(source.names())
    problems = [f"missing: {name} {shape}" for name, shape in needed.items() if name not in offered]
    problems += [
        f"unexpected: {name} {source.shape(name)}" for name in offered if name not in needed and not unneeded(name)
    ]
    problems += [
        f"shape of {name}: {source.shape(name)} in the weights, {shape} in the model"
        for name, shape in needed.items()
        if name in offered and source.shape(name) != shape
    ]
    return view, problems


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def unfit(tensors: dict[str, Any], view: StackedExperts) -> list[str]:
    """The problems of `tensors` that cannot take `view`'s values."""
    problems = []
    for name, tensor in tensors.items():
        if tensor.is_meta:
            problems.append(f"{name} is on the meta device: give it memory first (to_empty, or build under zero.Init)")
        if not isinstance(tensor, nn.Parameter) and torch.promote_types(tensor.dtype, view.dtype(name)) != tensor.dtype:
            problems.append(f"buffer {name} is {tensor.dtype}, which would round {view.dtype(name)}: keep it in fp32")
        if not hasattr(tensor, "ds_tensor"):
            continue
        if tensor.ds_tensor.final_location == "nvme":
            problems.append(f"{name} is partitioned to NVMe: offload parameters to cpu or none")
        if tensor.ds_secondary_tensor is not None:
            problems.append(f"{name} has a secondary partition (hpZ): set zero_hpz_partition_size to 1")
        if tensor.ds_status.name != "NOT_AVAILABLE":
            problems.append(f"{name} is gathered: load before deepspeed.initialize, outside GatheredParameters")
    return problems


def sink_of(source: WeightSource, name: str, tensor: Any) -> Sink:
    """The sink of a parameter, of this rank's partition of it, or of a buffer; zeroes and excludes padding."""
    if not hasattr(tensor, "ds_tensor"):
        assert tensor.is_contiguous(), f"{name} is not contiguous"
        return Sink(source, name, tensor.detach().view(-1), 0)
    partition = tensor.ds_tensor.detach().view(-1)
    start, kept = partition_range(tensor)
    partition[kept:].zero_()  # the padding is uninitialised memory, and a NaN there would spread through norms
    return Sink(source, name, partition[:kept], start)


def partition_range(parameter: Any) -> tuple[int, int]:
    """The start of this rank's partition in the flattened ZeRO-3 parameter, and its length without padding."""
    size = parameter.ds_tensor.numel()
    start = dist.get_rank(parameter.ds_process_group) * size
    return start, max(0, min(size, parameter.ds_numel - start))


def _jobs(sinks: list[Sink]) -> Iterator[tuple[Sink, int, int]]:
    for sink in sinks:
        for begin, end in chunks(0, sink.destination.numel()):
            yield sink, begin, end
