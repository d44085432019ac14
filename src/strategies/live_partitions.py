"""The weights of a running ZeRO job as a WeightSource, and the export from them at the end of `fit`.

Every rank keeps one contiguous range of each tensor: of the fp32 master where the optimizer has one, otherwise of the
parameter itself, in the model's precision; of experts that other ranks share it keeps nothing; buffers and what is not
partitioned are whole on every rank. An export reads tensors in the order of its files, so ranks want ranges of
different tensors at a time. They therefore read in rounds: in each, every rank says which range it wants, or that it
wants none, and one all-to-all brings everyone theirs. A rank whose own files are written goes on giving until nobody
wants anything.
"""

import tempfile
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from src.checkpoints.export import Export, OtherRankFailed
from src.checkpoints.export_folder import partial_of, start_live
from src.checkpoints.run_files import write_run_files
from src.weights.key_map import PerExpert
from src.weights.load import elsewhere, partition_range, persistent
from src.weights.output import Dtype

from .zero_parts import part_of

_NOTHING, _FAILED = -1, -2  # said in place of a tensor's index


@dataclass(frozen=True)
class _Part:
    """This rank's range of a tensor: elements [start, start + len(values)) of the flattened whole of `shape`."""

    shape: tuple[int, ...]
    values: Tensor
    start: int


class LivePartitions:
    """The weights of a model under a ZeRO engine of stage 0 to 3, in our parameter names.

    Every rank makes one, and reads inside `sharing`: a read may need all ranks, so it is for one thread. A rank holds
    what it reads, and what the others ask of it meanwhile: under stage 3 about one such range, in the worst case (all
    want what this rank alone has) as many as there are ranks.

    Args:
        engine: that trains the model.
        model: the language model inside it, whose names are ours.
        device: where the process group communicates; ranges pass through it, and come back to host memory.
    """

    def __init__(self, engine: DeepSpeedEngine, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._world_size = dist.get_world_size()
        parts = {name: _part(engine, tensor) for name, tensor in persistent(model).items()}
        parts |= {name: _nothing(tensor) for name, tensor in elsewhere(model).items()}
        # Sorted: which experts are elsewhere differs between ranks.
        self._indices = {name: index for index, name in enumerate(sorted(parts))}
        self._parts = [parts[name] for name in self._indices]
        ranges = [(part.start, part.start + part.values.numel()) for part in self._parts]
        mine = torch.tensor(ranges, device=device)  # [N, 2] of N tensors
        held = torch.empty(self._world_size * len(ranges), 2, dtype=mine.dtype, device=device)
        dist.all_gather_into_tensor(held, mine)
        self._held = held.view(self._world_size, -1, 2).cpu()  # [ranks, N, 2]: start and stop

    def names(self) -> Iterable[str]:
        return self._indices

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parts[self._indices[name]].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._parts[self._indices[name]].values.dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        part = self._parts[self._indices[name]]
        if part.start <= start and stop <= part.start + part.values.numel():
            return part.values[start - part.start : stop - part.start].cpu()
        received = self._round(self._indices[name], start, stop)
        assert received is not None
        return received.view(part.values.dtype)

    @contextmanager
    def sharing(self) -> Generator[None, None, None]:
        """Around everything that a rank reads: it ends on every rank when it has ended on all, or when one fails.

        Raises:
            OtherRankFailed: an error ended another rank's block.
        """
        try:
            yield
        except OtherRankFailed:
            raise
        except BaseException:
            self._round(_FAILED)
            raise
        while self._round(_NOTHING) is not None:
            pass

    def _round(self, index: int, start: int = 0, stop: int = 0) -> Tensor | None:
        """Takes this rank's range from those who hold it, as bytes, and gives the others theirs; None at the end."""
        mine = torch.tensor([index, start, stop], device=self._device)
        gathered = torch.empty(self._world_size * 3, dtype=mine.dtype, device=self._device)
        dist.all_gather_into_tensor(gathered, mine)
        wanted: list[list[int]] = gathered.view(-1, 3).tolist()
        failed = [rank for rank, (wants, _, _) in enumerate(wanted) if wants == _FAILED]
        if failed:
            if index == _FAILED:
                return None  # this rank's own error is on its way
            raise OtherRankFailed(f"rank {failed[0]} failed while the weights were exported; see its message")
        if all(wants == _NOTHING for wants, _, _ in wanted):
            return None
        sent = [self._piece(*one).to(self._device) for one in wanted]
        sizes = self._sizes(index, start, stop)
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        dist.all_to_all_single(received, torch.cat(sent), sizes, [len(piece) for piece in sent])
        return received.cpu()

    def _piece(self, index: int, start: int, stop: int) -> Tensor:
        """What this rank has of a range, as bytes."""
        if index == _NOTHING:
            return torch.empty(0, dtype=torch.uint8)
        part = self._parts[index]
        begin, end = (min(max(place - part.start, 0), part.values.numel()) for place in (start, stop))
        return part.values[begin:end].view(torch.uint8)

    def _sizes(self, index: int, start: int, stop: int) -> list[int]:
        """Bytes of a range that each rank has. Ranges ascend with the ranks, so what comes from them is in order."""
        if index == _NOTHING:
            return [0] * self._world_size
        held = self._held[:, index].clamp(start, stop)  # [ranks, 2]
        sizes = (held[:, 1] - held[:, 0]).tolist()
        assert sum(sizes) == stop - start, f"elements [{start}, {stop}) are held as {held.tolist()}"
        itemsize = self._parts[index].values.dtype.itemsize
        return [size * itemsize for size in sizes]


def _part(engine: DeepSpeedEngine, tensor: Any) -> _Part:
    """What this rank keeps of a parameter or buffer."""
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
    if tensor.requires_grad:
        part = part_of(engine, tensor)
        nothing = torch.empty(0, dtype=torch.float32)
        return _Part(shape, nothing, 0) if part is None else _Part(shape, part.of(part.flat), part.start)
    if hasattr(tensor, "ds_tensor"):  # frozen, at stage 3
        start, numel = partition_range(tensor)
        return _Part(shape, tensor.ds_tensor.detach().view(-1)[:numel], start)
    return _Part(shape, tensor.detach().reshape(-1), 0)


def _nothing(tensor: Tensor) -> _Part:
    """Of a parameter that other ranks have."""
    dtype = torch.float32 if tensor.requires_grad else tensor.dtype  # as their masters, or their weights
    return _Part(tuple(tensor.shape), torch.empty(0, dtype=dtype), 0)


def export_live(
    engine: DeepSpeedEngine,
    model: nn.Module,
    device: torch.device,
    run_files: dict[str, Any],
    out: Path,
    dtype: Dtype,
    max_shard_size: str,
    measure: bool = True,
) -> None:
    """Writes the weights of a running job as a Hugging Face directory; to be called on every rank.

    The files are those that `export --ckpt` writes from a checkpoint of the same step, byte for byte. Rank r of n
    writes number r, r + n, ... of them.

    Args:
        engine, model, device: as `LivePartitions` takes them.
        run_files: what `write_run_files` takes.
        out: directory that appears when all ranks have written their files.
        measure: read the base too, to find out how much of the training is kept.

    Raises:
        ValueError: `out` is there, the weights are not those of config.json, or the disk has no room for them.
        OtherRankFailed: another rank failed.
    """
    partitions = LivePartitions(engine, model, device)
    rank, world_size, partial = dist.get_rank(), dist.get_world_size(), partial_of(out)
    with partitions.sharing():
        if rank == 0:
            start_live(out)
    with ExitStack() as stack:
        with partitions.sharing():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_run_files(folder, **run_files)
            job = Export.plan(folder, PerExpert(partitions), dtype, max_shard_size, measure=measure)
            job.check_room(out)  # before any rank writes
        with partitions.sharing():
            if rank == 0:
                job.write_side_files(partial)
            job.write_shards(partial, rank, world_size)
        with partitions.sharing():
            if rank == 0:
                job.finish(partial, out)
