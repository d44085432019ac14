"""Text to packed token batches with exact target counts.

SFTDataModule is imported on first use, and Lightning with it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sft import SFTDataModule

__all__ = ["SFTDataModule"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import sft

    return getattr(sft, name)
