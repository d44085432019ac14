"""The one interface of this folder: a flat range of a named tensor.

A Hugging Face directory, a ZeRO checkpoint and random initial values are all read as `source.read(name, start, stop)`.
A ZeRO-3 partition is a contiguous range of the flattened tensor and a safetensors file stores tensors flattened, so
a range is what a rank needs and all that it has to read; nothing is ever held whole.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from src.errors import UserError

# Elements moved at a time by each thread: 16 MiB in fp32, large enough for a disk or a network file system to stream.
CHUNK = 1 << 22


class WeightSource(Protocol):
    """Named tensors of which any flat range can be read. Reads may come from several threads at once."""

    def names(self) -> Iterable[str]:
        """Every tensor's name, in the source's own order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` returns: the source's own precision, fp32 where it dequantises."""
        ...

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor: a 1-D CPU tensor [stop - start], not to be written to."""
        ...


def chunks(start: int, stop: int, step: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Splits [start, stop) into ranges of at most `step` elements."""
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)


def raise_listed(title: str, problems: list[str], limit: int = 50) -> None:
    """Raises one ValueError that lists all problems, beyond `limit` their number; nothing where there are none."""
    if problems:
        lines = problems[:limit] + ([f"... and {len(problems) - limit} more"] if len(problems) > limit else [])
        raise UserError("\n  ".join([title, *lines]))
