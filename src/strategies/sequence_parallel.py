"""The collectives of sequence parallelism, differentiable, over a torch.distributed group (gloo or NCCL).

Legend: SP the group's size, T tokens of the whole row.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A reduce-scatter that moves the gradients in their own dtype and adds them in fp32.
        pieces = _exchange(grad.unflatten(0, (ctx.group.size(), -1)), ctx.group)  # [SP, T/SP, ...]
        return pieces.sum(0, dtype=torch.float32).to(grad.dtype), None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.group), None  # the exchange is its own transpose


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class ProcessGroupSP:
    """`models.deepseek_v3.SequenceParallelGroup` over a torch.distributed group of more than one rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.size = group.size()

    def all_gather(self, x: Tensor) -> Tensor:
        return _AllGather.apply(x, self.group)

    def all_to_all(self, x: Tensor) -> Tensor:
        return _AllToAll.apply(x, self.group)

    def all_reduce(self, x: Tensor) -> Tensor:
        return _AllReduce.apply(x, self.group)
