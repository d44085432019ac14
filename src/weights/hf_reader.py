"""Reads byte ranges of a Hugging Face directory's safetensors files, and dequantises FP8.

Nothing is mapped or cached: a range is one `preadv` into the returned memory, so a process holds only what it asked
for.
"""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

import torch

from src.disk.json_file import read_object
from src.errors import UserError
from src.units import counted
from src.weights.fp8 import BLOCK, SCALE_SUFFIX, dequantise, scale_shape
from src.weights.safetensors_files import Stored, close, open_weights
from src.weights.source import raise_listed


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
