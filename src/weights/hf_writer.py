"""Writes a Hugging Face directory of safetensors files, tensor by tensor, from a plan made up front.

The plan, which tensor goes into which file, is a pure function of names, shapes, dtypes and `max_shard_size`. So any
process can write any file, and after a crash complete files are known from incomplete ones.

Names are transformers' own: `model.safetensors` for a single file, else `model-00001-of-000NN.safetensors` and
`model.safetensors.index.json`.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from src.disk.durable import sync_file
from src.disk.space import named_if_full
from src.weights.safetensors_files import DTYPE_NAMES, SINGLE_FILE


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: `chunks()` yields its elements in order, as 1-D CPU tensors of `dtype`.

    `notes()` returns, as JSON values, what was measured meanwhile; it is stored next to the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[], Iterator[torch.Tensor]]
    notes: Callable[[], Any] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file of the plan."""

    file: str
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def layout(self) -> tuple[bytes, dict[str, int]]:
        """The file's first bytes, and each tensor's offset in the file.

        Wide dtypes come first, so that each tensor begins at a multiple of its own item size: torch refuses to view a
        tensor elsewhere.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begins, end = {}, 0
        for tensor in sorted(self.tensors, key=lambda tensor: -tensor.dtype.itemsize):
            begins[tensor.name], end = end, end + tensor.nbytes
            header[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": tensor.shape,
                "data_offsets": (begins[tensor.name], end),
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = len(text).to_bytes(8, "little") + text
        return start, {name: len(start) + begin for name, begin in begins.items()}


def plan_shards(tensors: list[OutputTensor], max_shard_size: int) -> list[Shard]:
    """Fills files in order, each with at most `max_shard_size` bytes of tensors; a larger tensor has its own file."""
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def index(shards: list[Shard]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    return {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.tensors},
    }


def is_complete(directory: Path, shard: Shard) -> bool:
    """Whether `write_shard` has finished this file, which gets its name only then."""
    path = directory / shard.file
    return path.is_file() and path.stat().st_size == len(shard.layout()[0]) + shard.nbytes


def write_shard(directory: Path, shard: Shard, progress: Callable[[int], object] = lambda nbytes: None) -> None:
    """Writes one file under a temporary name, syncs it and renames it; holds one chunk of one tensor at a time.

    Args:
        progress: called with the bytes of each chunk written.
    """
    aside = directory / f".{shard.file}.{os.getpid()}"
    start, begins = shard.layout()
    with named_if_full(directory / shard.file), open(aside, "wb") as file:
        file.write(start)
        for tensor in shard.tensors:
            file.seek(begins[tensor.name])
            for chunk in tensor.chunks():
                assert chunk.dtype == tensor.dtype, f"{tensor.name}: {chunk.dtype} in a tensor of {tensor.dtype}"
                file.write(chunk.contiguous().view(torch.uint8).numpy().data)
                progress(chunk.nbytes)
            written = file.tell() - begins[tensor.name]
            assert written == tensor.nbytes, f"{tensor.name}: {written} bytes instead of {tensor.nbytes}"
        file.flush()
        os.fsync(file.fileno())
    notes = {tensor.name: tensor.notes() for tensor in shard.tensors if tensor.notes is not None}
    if notes:
        write_json(_notes_file(directory, shard), notes)
    aside.rename(directory / shard.file)


def read_notes(directory: Path, shards: list[Shard]) -> dict[str, Any]:
    """The notes on all tensors of complete files, by name."""
    notes: dict[str, Any] = {}
    for shard in shards:
        if any(tensor.notes is not None for tensor in shard.tensors):
            notes |= json.loads(_notes_file(directory, shard).read_text())
    return notes


def _notes_file(directory: Path, shard: Shard) -> Path:
    return directory / f".{shard.file}.notes"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that is complete or absent, even if the machine stops."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with named_if_full(path):
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sync_file(aside)
    aside.rename(path)
