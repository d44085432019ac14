"""The safetensors files of a Hugging Face directory: their headers, checked, and where each tensor lies.

File format: https://github.com/huggingface/safetensors (8 bytes header length, JSON header, data).
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from src.disk.json_file import read_object
from src.errors import UserError
from src.weights.key_map import mtp_layer

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor's place: in `file`, open as `descriptor`, `offset` bytes from its start."""

    file: Path
    descriptor: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def open_weights(path: Path, descriptors: list[int]) -> tuple[dict[str, Stored], list[str]]:
    """Opens a directory's safetensors files and reads only their headers.

    Args:
        path: holds model.safetensors, or model.safetensors.index.json and its shards.
        descriptors: receives the open files, for `close`.

    Returns:
        The tensors by name, and what is wrong with files and index.

    Raises:
        ValueError: the directory has no safetensors weights, or an index that cannot be read.
    """
    if (path / INDEX_FILE).is_file():
        index: dict[str, str] | None = _weight_map(path / INDEX_FILE)
        files = sorted(set(index.values())) if index else []
    elif (path / SINGLE_FILE).is_file():
        index, files = None, [SINGLE_FILE]
    else:
        raise UserError(
            f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}: give a Hugging Face directory with weights"
        )
    present = [file for file in files if (path / file).is_file()]
    problems = [f"{file}: missing" for file in files if file not in present]
    with ThreadPoolExecutor(16) as pool:  # hides the latency of a network file system
        opened = list(pool.map(lambda file: _open_file(path / file, descriptors), present))
    where: dict[str, str] = {}
    stored: dict[str, Stored] = {}
    for file, (tensors, wrong) in zip(present, opened, strict=True):
        problems += [f"{file}: {problem}" for problem in wrong]
        problems += [f"{file}: {name} is in {where[name]} too" for name in tensors if name in where]
        where |= dict.fromkeys(tensors, file)
        stored |= tensors
    if index is not None:
        readable = {file for file, (_, wrong) in zip(present, opened, strict=True) if not wrong}
        problems += [
            f"{INDEX_FILE}: {name} is not in {file}"
            for name, file in index.items()
            if file in readable and where.get(name) != file
        ]
        problems += [f"{file}: {name} is not in {INDEX_FILE}" for name, file in where.items() if name not in index]
    return stored, problems


def _weight_map(file: Path) -> dict[str, str]:
    names = read_object(file).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{file} has no weight_map of tensors' names to files' names; copy it again")
    if outside := sorted({name for name in names.values() if Path(name).name != name}):
        raise UserError(f"{file} names files that are not in its folder: {', '.join(map(repr, outside[:3]))}")
    return names


def _open_file(file: Path, descriptors: list[int]) -> tuple[dict[str, Stored], list[str]]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
        descriptors.append(descriptor)
        size = os.fstat(descriptor).st_size
        header, data = _header(descriptor, size)
    except OSError as error:
        return {}, [f"cannot be read: {error.strerror}"]
    except ValueError as error:
        return {}, [str(error)]
    tensors, problems, end, total = {}, [], 0, 0
    for name, entry in header.items():
        end, total = max(end, entry["data_offsets"][1]), total + entry["data_offsets"][1] - entry["data_offsets"][0]
        if entry["dtype"] not in DTYPES:
            problems.append(f"{name} is {entry['dtype']}, which is none of {', '.join(DTYPES)}")
            continue
        begin, stop = entry["data_offsets"]
        stored = Stored(file, descriptor, data + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if stop - begin != stored.numel * stored.dtype.itemsize:
            problems.append(f"{name} of shape {stored.shape} has {stop - begin} bytes")
        tensors[name] = stored
    if total != end:
        problems.append(f"its tensors overlap or leave gaps: they have {total} bytes and end at {end}")
    if data + end != size:
        kind = "truncated" if size < data + end else "longer than its header says"
        problems.append(f"{kind}, {size} bytes instead of {data + end}")
    return tensors, problems


def _header(descriptor: int, size: int) -> tuple[dict[str, Any], int]:
    """A safetensors file's entries and the byte where its data starts; ValueError if it cannot be read."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little") if size >= 8 else 0
    if not 0 < length <= min(size - 8, _MAX_HEADER):
        raise ValueError(f"truncated, or no safetensors file: {size} bytes, header of {length}")
    try:
        header = json.loads(os.pread(descriptor, length, 8))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("the header lists no tensors")
    header.pop("__metadata__", None)
    if wrong := [name for name, entry in header.items() if not _is_entry(entry)]:
        raise ValueError(f"the header's entry of {wrong[0]!r} is no tensor's: {str(header[wrong[0]])[:100]}")
    return header, 8 + length


def _is_entry(entry: Any) -> bool:
    """Whether an entry has dtype, shape and data offsets of the format's types."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    sizes = [*shape, *offsets]
    return all(type(n) is int and 0 <= n < 2**63 for n in sizes) and offsets[0] <= offsets[1]


def has_mtp(directory: str | Path, num_hidden_layers: int) -> bool:
    """Whether a directory's weights, if any, have an MTP block; reads only headers."""
    return any(mtp_layer(name, num_hidden_layers) for name in stored_dtypes(directory))


def stored_dtypes(directory: str | Path) -> dict[str, torch.dtype]:
    """The dtypes of a directory's tensors by name, empty without weights; reads only headers."""
    if not any(Path(directory).glob("*.safetensors")):
        return {}
    descriptors: list[int] = []
    try:
        tensors, _ = open_weights(Path(directory), descriptors)
    finally:
        close(descriptors)
    return {name: stored.dtype for name, stored in tensors.items()}


def close(descriptors: list[int]) -> None:
    """Closes the files of `open_weights`."""
    for descriptor in descriptors:
        os.close(descriptor)
