"""Ranks: the DP x SP mesh, the SP collectives, ZeRO, activation checkpointing.

The strategy is imported on first use: `zero_limits` needs no torch, and is read without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deepspeed_sp import DeepSpeedSPStrategy

__all__ = ["DeepSpeedSPStrategy"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import deepspeed_sp

    return getattr(deepspeed_sp, name)
