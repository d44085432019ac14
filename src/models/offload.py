"""Tensors that wait in pinned host memory from the forward pass to the backward, copied beside the computation."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

# What is fetched ahead while a layer's backward runs: as many tensors as a layer leaves here (its input, its
# attention's output and log-sums, its output projection).
AHEAD = 4


class Waiting:
    """A tensor that `HostStack` keeps; take it back once with `HostStack.take`."""

    def __init__(self, tensor: Tensor) -> None:
        self.device, self.shape, self.dtype = tensor.device, tensor.shape, tensor.dtype
        self.host: Tensor | None = None
        self.fetched: Tensor | None = None
        self.ready: torch.cuda.Event | None = None


class HostStack:
    """A stack in pinned host memory. Copies out and in run on a stream of their own.

    Tensors are taken back in about the reverse order; the next ones are fetched meanwhile. Buffers are kept for the
    next step. Tensors that are not on a CUDA device stay where they are.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}  # in the order of `put`
        self._buffers: dict[int, list[Tensor]] = defaultdict(list)  # pinned, by size in bytes
        self._stream: torch.cuda.Stream | None = None

    def put(self, tensor: Tensor) -> Any:
        """Starts the copy to the host; returns what `take` wants. The tensor must not be changed afterwards."""
        if not tensor.is_cuda:
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        item = Waiting(tensor)
        source = tensor.contiguous()
        item.host = self._buffer(source.nbytes)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            item.host.copy_(source.view(-1).view(torch.uint8), non_blocking=True)
        source.record_stream(self._stream)
        self._waiting[id(item)] = item
        return item

    def take(self, item: Any) -> Tensor:
        """The tensor again, on its device; starts fetching the ones that were put before it."""
        if not isinstance(item, Waiting):
            assert isinstance(item, Tensor)
            return item
        del self._waiting[id(item)]
        self._fetch(item)
        before = list(self._waiting.values())[-AHEAD:]
        for other in reversed(before):
            self._fetch(other)
        assert item.fetched is not None and item.ready is not None
        current = torch.cuda.current_stream(item.device)
        current.wait_event(item.ready)
        item.fetched.record_stream(current)
        tensor, item.fetched = item.fetched, None
        return tensor

    def clear(self) -> None:
        """Forgets what was never taken back: a forward pass without a backward."""
        for item in self._waiting.values():
            if item.host is not None:
                self._buffers[item.host.nbytes].append(item.host)
        self._waiting.clear()

    def _fetch(self, item: Waiting) -> None:
        if item.host is None:  # under way or done
            return
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            fetched = torch.empty(item.shape, dtype=item.dtype, device=item.device)
            fetched.view(-1).view(torch.uint8).copy_(item.host, non_blocking=True)
            item.ready = torch.cuda.Event()
            item.ready.record(self._stream)
        item.fetched = fetched
        # Every copy runs on one stream, so the buffer's next use comes after this one.
        self._buffers[item.host.nbytes].append(item.host)
        item.host = None

    def _buffer(self, nbytes: int) -> Tensor:
        if self._buffers[nbytes]:
            return self._buffers[nbytes].pop()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
