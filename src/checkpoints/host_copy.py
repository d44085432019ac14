"""Copies a training state to host memory, where later steps do not change it."""

import copy
import math
import mmap
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

# Memory is not kept for smaller tensors.
KEPT = 1 << 20


class HostMemory:
    """Memory for one copy at a time, kept for the next: touching new pages takes several times as long as copying."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._taken: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """`size` bytes: uint8 [size]."""
        if size < KEPT:
            return torch.empty(size, dtype=torch.uint8)
        buffer = self._free[size].pop() if self._free[size] else _new(size)
        self._taken.append(buffer)
        return buffer

    def reuse(self) -> None:
        """Makes taken memory available again, and frees what was not taken since the last call."""
        self._free.clear()
        for buffer in self._taken:
            self._free[buffer.nbytes].append(buffer)
        self._taken.clear()


def _new(size: int) -> Tensor:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages, which are faster to touch and copy to
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def host_copy(state: Any, memory: HostMemory) -> Any:
    """A deep copy of nested dictionaries, lists and objects, every tensor on the host.

    Tensors that share a storage share it in the copy too where together they cover it; else each is copied alone, so
    that no view keeps more than its own elements. Nothing is rounded, and plain tensors stand for parameters.
    """
    groups: dict[tuple[torch.device, int], dict[int, Tensor]] = {}
    for tensor in tensors(state):
        groups.setdefault(_storage(tensor), {})[id(tensor)] = tensor.detach()
    copies: dict[int, Any] = {}
    for group in groups.values():
        copies |= _copy_group(group, memory)
    return copy.deepcopy(state, copies)  # which takes what stands under an object's id for its copy


def nbytes(state: Any) -> int:
    """Bytes of the storages behind a state's tensors, each once: what torch.save writes, but for its small headers."""
    storages = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors(state)}
    return sum(storages.values())


def tensors(item: Any) -> Iterator[Tensor]:
    """Every tensor in nested dictionaries, lists and tuples."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from tensors(value)
    elif isinstance(item, list | tuple):
        for value in item:
            yield from tensors(value)


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _copy_group(group: dict[int, Tensor], memory: HostMemory) -> dict[int, Tensor]:
    """Copies the tensors of one storage, each under its name."""
    views = {(t.storage_offset(), t.shape, t.stride(), t.dtype): t for t in group.values()}
    any_view = next(iter(views.values()))
    storage = any_view.untyped_storage()
    if sum(t.nbytes for t in views.values()) >= storage.nbytes():
        whole = torch.empty(0, dtype=torch.uint8, device=any_view.device).set_(storage)
        kept = _to_host(whole, memory).untyped_storage()
        copied = {
            key: torch.empty(0, dtype=t.dtype).set_(kept, t.storage_offset(), t.shape, t.stride())
            for key, t in views.items()
        }
    else:
        copied = {key: _to_host(t, memory) for key, t in views.items()}
    return {name: copied[t.storage_offset(), t.shape, t.stride(), t.dtype] for name, t in group.items()}


def _to_host(tensor: Tensor, memory: HostMemory) -> Tensor:
    buffer = memory.take(math.prod(tensor.shape) * tensor.element_size())
    return buffer.view(tensor.dtype).view(tensor.shape).copy_(tensor)
