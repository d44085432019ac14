"""A process group of any size with one process: what the other ranks would send is made from this rank's own tensors.

A gather gives every rank's place this rank's part, moved on by as many elements as the rank's number: values of the
right size and spread, and routers whose rows differ. Sums are of this rank alone. An exchange returns its input, as if
every rank sent to this one what this one sends to it: parts may be of any size, and where ranks share the experts, this
rank receives as many rows as it sends, which is the mean of all ranks, for experts that it has. All else is as over a
network: sizes, buffers, and the stream that a collective is started on, which `wait` makes the current one wait for.
"""

# mypy: disable-error-code="override,assignment"
# c10d's methods have several forms; here is the one of each that torch.distributed calls.

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work
from torch.futures import Future

BACKEND = "loopback"


class _Done(Work):
    def __init__(self, result: Any) -> None:
        super().__init__()
        self._event = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self._future: Future[Any] = Future()
        self._future.set_result(result)

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        return True

    def is_completed(self) -> bool:
        return self._event is None or self._event.query()

    def get_future(self) -> Future[Any]:
        return self._future


class LoopbackGroup(dist.ProcessGroup):
    """The collectives that DeepSpeed, Lightning and this project call, in c10d's names."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank, self._size = rank, size

    def getBackendName(self) -> str:
        return BACKEND

    # -- gathers ----------------------------------------------------------------------------------------------------

    def _gather(self, out: Tensor, part: Tensor) -> None:
        """out: [size * n]; part: [n]."""
        out, part = out.view(self._size, -1), part.reshape(-1)
        if part.is_floating_point() and part.numel() > self._size:
            twice = torch.cat([part, part[: self._size]])
            out.copy_(twice.as_strided(out.shape, (1, 1)))  # row r begins at element r
        else:
            out.copy_(part.clone())  # DeepSpeed gathers in place: the part is one of the places

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        self._gather(output, input)
        return _Done([output])

    def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        for output, part in zip(outputs, inputs, strict=True):
            self._gather(output, part)
        return _Done(outputs)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        for places, part in zip(outputs, inputs, strict=True):
            for place in places:
                place.copy_(part)
        return _Done(outputs)

    # -- reductions -------------------------------------------------------------------------------------------------

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        output.copy_(input.reshape(self._size, *output.shape)[self._rank])
        return _Done([output])

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        for output, whole in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, whole)
        return _Done(outputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Work:
        for output, parts in zip(outputs, inputs, strict=True):
            output.copy_(parts[self._rank])
        return _Done(outputs)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        return _Done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Work:
        return _Done(tensors)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        return _Done(tensors)

    # -- the rest ---------------------------------------------------------------------------------------------------

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any = None
    ) -> Work:
        if list(output_sizes) != list(input_sizes):
            raise NotImplementedError("another number of rows from a rank than to it")
        output.copy_(input)
        return _Done([output])

    def _start_coalescing(self, device: torch.device) -> None:
        pass

    def _end_coalescing(self, device: torch.device) -> Work:
        return _Done([])

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Work:
        return _Done(tensors)

    def barrier(self, opts: Any = None) -> Work:
        return _Done([])

    # As torch 2.13 calls them; 2.11 calls the others.
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> LoopbackGroup:
    return LoopbackGroup(rank, size)


def join(size: int) -> None:
    """Makes this process rank 0 of `size` for torch.distributed; DeepSpeed and Lightning take the group as it is."""
    dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, rank=0, world_size=size, store=dist.HashStore())
