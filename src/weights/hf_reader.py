"""Reads byte ranges of a Hugging Face directory's safetensors files, and dequantises FP8.

Nothing is mapped or cached: a range is one `preadv` into the returned memory, so a process holds only what it asked
for. File format: https://github.com/huggingface/safetensors (8 bytes header length, JSON header, data).
"""

import json
import math
import os
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from src.disk.json_file import read_object
from src.errors import UserError
from src.units import counted
from src.weights.fp8 import BLOCK, SCALE_SUFFIX, dequantise, scale_shape
from src.weights.key_map import mtp_layer
from src.weights.source import raise_listed

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


class HFDirectorySource:
    """The tensors of a Hugging Face model directory, BF16, F16 and F32 as stored, FP8 dequantised to fp32.

    Args:
        path: holds model.safetensors, or model.safetensors.index.json and its shards.
        dequantise: False offers the FP8 values and `weight_scale_inv` as stored, for copying.

    Raises:
        ValueError: the directory has no safetensors weights; or one list of all that is wrong with it: missing or
            truncated files, an index that does not agree with them, dtypes or scales that are not of DeepSeek's format.

    Attributes:
        bytes_read: bytes of tensors read so far, headers not counted.
    """

    def __init__(self, path: str | Path, *, dequantise: bool = True) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        self._lock = Lock()
        self._descriptors: list[int] = []
        weakref.finalize(self, close, self._descriptors)
        self._dequantise = dequantise
        self._block = _block_size(self.path)
        self._tensors, problems = open_weights(self.path, self._descriptors)
        if dequantise:
            problems += self._wrong_scales()
        raise_listed(
            f"{self.path}: {counted(len(problems), 'problem')} with the weights; copy these files again:", problems
        )

    def names(self) -> Iterable[str]:
        return [name for name in self._tensors if not self._is_scale(name)]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors and not self._is_scale(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self._is_fp8(name) else self._tensors[name].dtype

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._tensors[name]
        assert 0 <= start <= stop <= stored.numel, f"{name}: range [{start}, {stop}) of {stored.numel} elements"
        values = self._read_stored(name, start, stop)
        if start == stop or not self._is_fp8(name):
            return values.to(self.dtype(name))
        columns, scale_columns = stored.shape[1], self.shape(name + SCALE_SUFFIX)[1]
        first, last = (element // columns // self._block[0] for element in (start, stop - 1))
        scale = self._read_stored(name + SCALE_SUFFIX, first * scale_columns, (last + 1) * scale_columns)
        return dequantise(values, scale.view(-1, scale_columns), start, columns, self._block)

    def scales(self, name: str, first_row: int, stop_row: int) -> torch.Tensor | None:
        """The scales [rows, columns of blocks] of some rows of an FP8 weight in 128 x 128 blocks; None for others.

        first_row: a multiple of 128.
        """
        if not self._is_fp8(name) or self._block != (BLOCK, BLOCK):
            return None
        assert first_row % BLOCK == 0, f"{name}: row {first_row} is inside a block"
        columns = self.shape(name + SCALE_SUFFIX)[1]
        first, stop = first_row // BLOCK, -(-stop_row // BLOCK)
        return self._read_stored(name + SCALE_SUFFIX, first * columns, stop * columns).view(-1, columns)

    def _is_fp8(self, name: str) -> bool:
        return self._dequantise and self._tensors[name].dtype == torch.float8_e4m3fn

    def _is_scale(self, name: str) -> bool:
        return self._dequantise and name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in self._tensors

    def _read_stored(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._tensors[name]
        buffer = torch.empty((stop - start) * stored.dtype.itemsize, dtype=torch.uint8)
        _read_into(buffer, stored, start * stored.dtype.itemsize, name)
        with self._lock:
            self.bytes_read += buffer.numel()
        return buffer.view(stored.dtype)

    def _wrong_scales(self) -> list[str]:
        problems = []
        for name, stored in self._tensors.items():
            if stored.dtype != torch.float8_e4m3fn:
                continue
            scale = self._tensors.get(name + SCALE_SUFFIX)
            if scale is None:
                problems.append(f"{name} is FP8 but {name}{SCALE_SUFFIX} is missing")
            elif len(stored.shape) != 2 or scale.shape != scale_shape(stored.shape, self._block):
                problems.append(
                    f"{name}{SCALE_SUFFIX} is {scale.shape} for a weight {stored.shape} in blocks {self._block}"
                )
            elif scale.dtype != torch.float32:
                problems.append(f"{name}{SCALE_SUFFIX} is {scale.dtype}, not float32")
        return problems


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


def _read_into(buffer: torch.Tensor, stored: Stored, begin: int, name: str) -> None:
    """Fills `buffer` from byte `begin` of the tensor `name` on."""
    view, offset = buffer.numpy().data, stored.offset + begin
    while view:
        try:
            count = os.preadv(stored.descriptor, [view], offset)  # a call reads 2 GiB at most
        except OSError as error:
            raise UserError(
                f"{stored.file}: {name} cannot be read at byte {offset}: {error.strerror}; check the disk, or copy the "
                "file again"
            ) from error
        if count == 0:
            raise UserError(f"{stored.file}: {name}: the file ended at byte {offset}; it was cut while being read")
        view, offset = view[count:], offset + count


def _block_size(path: Path) -> tuple[int, int]:
    config = path / "config.json"
    if not config.is_file():
        return BLOCK, BLOCK
    quantization = read_object(config).get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise UserError(f"{config}: quantization_config is {quantization!r}; it must be an object")
    size = quantization.get("weight_block_size") or [BLOCK, BLOCK]
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise UserError(f"{config}: weight_block_size is {size!r}; two positive integers are needed")
    return size[0], size[1]


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
