"""Projections that a layer's recomputation does not repeat.

Legend: T tokens, R input width, H output width.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .recompute import Kept, placeholder, recomputing


class _Linear(Function):
    """x W^T + b whose value `compute` gives, or leaves out.

    The weight is held by reference: under checkpointing, one that is saved comes back as an alias of the tensor that
    ZeRO-3 has released.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Module, compute: Callable[[], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        return compute()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad = grad.to(x.dtype)
        grad_weight = grad.T @ x if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad @ ctx.module.weight, grad_weight, grad_bias, None, None


def linear(x: Tensor, module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
    """[T, R] -> [T, H] with the gradients of a projection by `module`'s weight and bias, computed by `compute`."""
    out: Tensor = _Linear.apply(x, module.weight, getattr(module, "bias", None), module, compute)
    return out


class KeptLinear(nn.Linear):
    """A projection [T, R] -> [T, H] whose output is kept over the layer's recomputation where `kept` is given."""

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        if kept is None:
            return super().forward(x)
        return linear(x, self, lambda: kept.once(lambda: (super(KeptLinear, self).forward(x),))[0])


class LastLinear(nn.Linear):
    """A projection [T, R] -> [T, H] that nothing in its layer comes after but sums: a recomputation leaves it out."""

    def forward(self, x: Tensor) -> Tensor:
        def compute() -> Tensor:
            if recomputing():
                return placeholder(x, len(x), self.out_features)
            return F.linear(x, self.weight, self.bias)

        return linear(x, self, compute)
