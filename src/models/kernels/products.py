"""Matrix products: in groups of rows, and with sums in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Row group j of x [M, A], rows offsets[j-1] to offsets[j], times weights[j] of [e, A, B] -> [M, B].

    offsets [e] int32 ends at M. With two 2-D operands, [A, M] and [M, B] -> [e, A, B]: the weight gradient's form.
    """
    return F.grouped_mm(x, weights, offs=offsets)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a [M, A] times b [A, B] -> fp32 [M, B]: on CUDA in the operands' own dtype, summed and returned in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_matmul_fp32(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """Adds alpha * a [M, A] b [A, B] to fp32 `total` [M, B], the product unrounded on CUDA."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, alpha=alpha, out_dtype=torch.float32, out=total)
    else:
        total.add_(a @ b, alpha=alpha)
