"""The facade of all kernels: what the model computes with.

Each entry has a plain PyTorch path, which runs anywhere and which every fast path is tested against. Attention is
chosen by name (attention.py), everything else by the device: Triton's kernels on CUDA (triton_kernels.py), else plain
PyTorch.
"""

from .attention import ATTENTION, AttentionKernel, Packing, resolve_attention
from .pointwise import (
    add_rows,
    assemble_heads,
    cross_entropy_rows,
    gated_unit,
    sum_rows,
    swiglu,
    swiglu_backward,
)
from .products import add_matmul_fp32, grouped_mm, matmul_fp32

__all__ = [
    "ATTENTION",
    "AttentionKernel",
    "Packing",
    "add_matmul_fp32",
    "add_rows",
    "assemble_heads",
    "cross_entropy_rows",
    "gated_unit",
    "grouped_mm",
    "matmul_fp32",
    "resolve_attention",
    "sum_rows",
    "swiglu",
    "swiglu_backward",
]
