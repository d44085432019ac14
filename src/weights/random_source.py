"""Initial values for `from_scratch`: a WeightSource that computes any range of any tensor from (seed, name)."""

import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from src.weights.key_map import hf_shapes

if TYPE_CHECKING:
    from transformers import DeepseekV3Config

_BLOCK = 1 << 16


class RandomSource:
    """Normal(0, initializer_range) for matrices, ones for norms, zeros for biases, in Hugging Face names, fp32.

    Each block of 65,536 elements has its own Philox counter under a key made from seed and name, so a range's values
    depend neither on its reader (DP, SP, world, experts_per_shard) nor on earlier reads.

    Args:
        config: its shapes and initializer_range.
        seed: any integer.
        mtp: whether the MTP block's tensors are offered too; a model without the block does not ask for them.
    """

    def __init__(self, config: "DeepseekV3Config", seed: int, *, mtp: bool = True) -> None:
        self._shapes = hf_shapes(config, mtp=mtp)
        self._deviation = float(config.initializer_range)
        self._seed = seed

    def names(self) -> Iterable[str]:
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(stop - start, dtype=torch.float32)
        if name.endswith("bias"):
            return torch.zeros(stop - start, dtype=torch.float32)
        key = int.from_bytes(hashlib.sha256(f"{self._seed}:{name}".encode()).digest()[:16], "little")
        numel, values = math.prod(self.shape(name)), np.empty(stop - start, dtype=np.float32)
        for block in range(start // _BLOCK, -(-stop // _BLOCK)):
            begin = block * _BLOCK
            # The block's number is the high word of the counter: no two blocks of a tensor overlap.
            generator = np.random.Generator(np.random.Philox(key=key, counter=block << 192))
            drawn = generator.standard_normal(min(_BLOCK, numel - begin), dtype=np.float32)
            first, last = max(start, begin), min(stop, begin + _BLOCK)
            values[first - start : last - start] = drawn[first - begin : last - begin]
        return torch.from_numpy(values).mul_(self._deviation)
