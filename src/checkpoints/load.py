"""Weights into a model, in place: each rank reads the ranges that it keeps, nothing is gathered or broadcast.

Under ZeRO-3 rank r of n keeps the elements [r*p, (r+1)*p) of each flattened parameter, p = ceil(numel / n), in
`param.ds_tensor`; the last partitions end in padding (deepspeed/runtime/zero/partition_parameters.py, 0.19.8,
`Init._partition_param`). Other parameters and all buffers are filled whole. Call it outside `zero.Init` and before
`deepspeed.initialize`, which copies the fp32 masters from what stands here.
"""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from src.checkpoints.key_map import StackedExperts, mtp_copies, mtp_layer
from src.checkpoints.source import WeightSource, chunks, raise_listed

log = logging.getLogger(__name__)

# Together with CHUNK this bounds the memory beyond the partition: 8 x (16 MiB as stored + 32 MiB dequantised).
THREADS = 8


@dataclass(frozen=True)
class _Target:
    """Where a tensor, or this rank's range of it, goes: destination [n] takes [start, start + n), padding cut off."""

    name: str
    destination: torch.Tensor
    start: int


def load(
    model: nn.Module, source: WeightSource, *, num_hidden_layers: int, threads: int = THREADS, progress: bool = True
) -> None:
    """Fills the parameters and persistent buffers of `model` from `source`.

    Args:
        model: plain parameters or ZeRO-3 partitions, on any device but meta; names as in `src.checkpoints.key_map`.
        source: in Hugging Face names; each value is cast to the parameter's dtype as it is copied.
        num_hidden_layers: layers from this id on are the MTP block, which only `source` may have.
        threads: reads in flight.
        progress: a bar with bytes a second, on rank 0.

    Raises:
        ValueError: one list of all tensors that are missing, unexpected or of another shape, and of destinations that
            cannot take them, before anything is read.
    """
    tensors = _persistent(model)
    view = StackedExperts(source, {name: _shape(tensor) for name, tensor in tensors.items()})
    problems = _mismatches(view, source, num_hidden_layers)
    if not problems:  # a destination is compared with its source, which must be there
        problems = _unfit(tensors, view)
    raise_listed(f"{len(problems)} tensors do not fit the model; check config.json against the weights:", problems)

    targets = [_target(name, tensor) for name, tensor in tensors.items()]
    rank = dist.get_rank() if dist.is_initialized() else 0
    total = sum(target.destination.nbytes for target in targets)
    started = time.monotonic()

    def fill(job: tuple[_Target, int, int]) -> int:
        target, begin, end = job
        part = target.destination[begin:end]
        part.copy_(view.read(target.name, target.start + begin, target.start + end))
        return part.nbytes

    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress or rank != 0) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        for nbytes in pool.map(fill, _jobs(targets)):
            bar.update(nbytes)
    if rank == 0:
        seconds = time.monotonic() - started
        log.info("rank 0 loaded %.2f GB in %.1f s (%.2f GB/s)", total / 1e9, seconds, total / 1e9 / max(seconds, 1e-9))


def _persistent(model: nn.Module) -> dict[str, Any]:
    """Parameters, partitioned or not, and those buffers that a checkpoint holds, by name."""
    kept = model.state_dict().keys()  # under ZeRO-3 the values are placeholders; the keys are right
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _mismatches(view: StackedExperts, source: WeightSource, num_hidden_layers: int) -> list[str]:
    needed = {piece.name: piece.shape for pieces in view.pieces.values() for piece in pieces}
    offered = dict.fromkeys(source.names())
    problems = [f"missing: {name} {shape}" for name, shape in needed.items() if name not in offered]
    copies = mtp_copies(num_hidden_layers)
    builds_mtp = any(mtp_layer(name, num_hidden_layers) for name in needed)
    problems += [
        f"unexpected: {name} {source.shape(name)}"
        for name in offered
        if name not in needed
        and name not in copies
        and not name.endswith("rotary_emb.inv_freq")
        and (builds_mtp or not mtp_layer(name, num_hidden_layers))
    ]
    problems += [
        f"shape of {name}: {source.shape(name)} in the weights, {shape} in the model"
        for name, shape in needed.items()
        if name in offered and source.shape(name) != shape
    ]
    return problems


def _unfit(tensors: dict[str, Any], view: StackedExperts) -> list[str]:
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


def _target(name: str, tensor: Any) -> _Target:
    if not hasattr(tensor, "ds_tensor"):
        assert tensor.is_contiguous(), f"{name} is not contiguous"
        return _Target(name, tensor.detach().view(-1), 0)
    partition = tensor.ds_tensor.detach().view(-1)
    start = dist.get_rank(tensor.ds_process_group) * partition.numel()
    kept = max(0, min(partition.numel(), tensor.ds_numel - start))
    partition[kept:].zero_()  # the padding is uninitialised memory, and a NaN there would spread through norms
    return _Target(name, partition[:kept], start)


def _jobs(targets: list[_Target]) -> Iterator[tuple[_Target, int, int]]:
    for target in targets:
        for begin, end in chunks(0, target.destination.numel()):
            yield target, begin, end
