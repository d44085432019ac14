"""Reads files of a checkpoint without running code from them: an unrestricted pickle may call anything."""

import pickle
from pathlib import Path, PosixPath
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from src.errors import UserError

# All classes that DeepSpeed and Lightning save besides tensors and plain Python.
ALLOWED = [DynamicLossScaler, LossScaler, PosixPath, ZeroStageEnum, fragment_address]


def load_safely(file: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a file that torch.save wrote; tensors stay on disk until they are touched.

    Raises:
        UserError: it holds an object of another class than `ALLOWED`, or is damaged.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            content: dict[str, Any] = torch.load(file, map_location=map_location, mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file} holds an object that is not loaded for safety; if you trust the file, allow its class with "
            f"torch.serialization.add_safe_globals: {reason}"
        ) from error
    except Exception as error:  # PyTorch raises another one for each place of damage
        raise UserError(
            f"{file} cannot be loaded ({' '.join(str(error).split())[:200]}); use another checkpoint"
        ) from error
    return content
