"""Tensors that wait in pinned host memory from the forward pass to the backward, copied beside the computation."""

import contextlib
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .pinned import pinned

# Bytes that are copied out at once: the device's engine takes one copy after the other, and the experts' route, which
# the host waits for, would otherwise wait behind a layer's whole output (7 ms per layer of 671B, measured).
CHUNK = 32 * 2**20


class Waiting:
    """A tensor that `HostStack` keeps; take it back once with `HostStack.take`."""

    def __init__(self, tensor: Tensor) -> None:
        self.device, self.shape, self.dtype = tensor.device, tensor.shape, tensor.dtype
        self.host: Tensor | None = None
        self.fetched: Tensor | None = None
        self.ready: torch.cuda.Event | None = None


class HostStack:
    """A stack in pinned host memory. Copies out and in run on a stream of their own.

    Tensors are taken back in about the reverse order; the next ones are fetched meanwhile. The n-th tensor of a forward
    pass has the n-th buffer, which is as large as it would be for the longest row, so that rows of all lengths share
    the buffers. Tensors that are not on a CUDA device stay where they are.

    longest: tokens of the longest row that can come, of one SP rank; a longer one enlarges the buffers.
    ahead: tensors that are fetched before they are asked for: as many as a layer leaves here.
    also_cpu: keeps tensors of the CPU too, for tests.
    """

    def __init__(self, also_cpu: bool = False) -> None:
        self.longest, self.ahead = 0, 1
        self._also_cpu = also_cpu
        self._tokens = 1
        self._waiting: dict[int, Waiting] = {}  # in the order of `put`
        self._buffers: list[Tensor] = []  # pinned, uint8
        self._used = 0
        self._stream: torch.cuda.Stream | None = None

    def begin(self, tokens: int) -> None:
        """A forward pass over a row of so many tokens; forgets what was never taken back."""
        self._waiting.clear()
        self._tokens, self.longest, self._used = tokens, max(self.longest, tokens), 0

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def put(self, tensor: Tensor) -> Any:
        """Starts the copy to the host; returns what `take` wants. The tensor must not be changed afterwards."""
        if not (tensor.is_cuda or self._also_cpu):
            return tensor
        if self._stream is None and tensor.is_cuda:
            self._stream = torch.cuda.Stream(tensor.device)
        item = Waiting(tensor)
        source = tensor.contiguous()
        item.host = self._buffer(source.nbytes)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
            source.record_stream(self._stream)
        with self._beside():
            for there, part in zip(item.host.split(CHUNK), source.view(-1).view(torch.uint8).split(CHUNK), strict=True):
                there.copy_(part, non_blocking=True)
        self._waiting[id(item)] = item
        return item

    def take(self, item: Any) -> Tensor:
        """The tensor again, on its device; starts fetching the ones that were put before it."""
        if not isinstance(item, Waiting):
            assert isinstance(item, Tensor)
            return item
        del self._waiting[id(item)]
        self._fetch(item)
        for other in islice(reversed(self._waiting.values()), self.ahead):
            self._fetch(other)
        assert item.fetched is not None
        if item.ready is not None:
            current = torch.cuda.current_stream(item.device)
            current.wait_event(item.ready)
            item.fetched.record_stream(current)
        tensor, item.fetched = item.fetched, None
        return tensor

    def _beside(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _fetch(self, item: Waiting) -> None:
        if item.host is None:  # under way or done
            return
        with self._beside():
            fetched = torch.empty(item.shape, dtype=item.dtype, device=item.device)
            fetched.view(-1).view(torch.uint8).copy_(item.host, non_blocking=True)
            if self._stream is not None:
                item.ready = torch.cuda.Event()
                item.ready.record(self._stream)
        item.fetched, item.host = fetched, None

    def _buffer(self, nbytes: int) -> Tensor:
        """The next one; every copy runs on one stream, so its use in the next forward pass comes after this one's."""
        index, self._used = self._used, self._used + 1
        if index == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[index].nbytes < nbytes:
            if self._stream is not None:
                self._stream.synchronize()  # the smaller one is given back, and may still be copied from
            self._buffers[index] = pinned(-(-nbytes * self.longest // self._tokens))
        return self._buffers[index][:nbytes]
