"""The random state of a run: Python's, NumPy's, PyTorch's and this process's CUDA device's.

Nothing of ours draws from it while training: rows are ordered, and initial weights drawn, from generators of their own,
and the model has no dropout. Every rank is seeded alike, so rank 0's state is everyone's, on whatever layout.
"""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state as tensors and plain Python, which a checkpoint may hold under `weights_only`."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Sets what `random_state` returned; CUDA's where both runs have a device."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
