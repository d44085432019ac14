"""Text to packed token batches with exact target counts."""

from .sft import SFTDataModule

__all__ = ["SFTDataModule"]
