"""ZeRO-3 checkpoints written without training, as DeepSpeed 0.19.8 lays them out: sizes that training would not fit.

test_zero_reader.py shows that the reader agrees with DeepSpeed; here only the reader's input is made.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BUFFER_NAMES,
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
    PARTITION_COUNT,
    ZERO_STAGE,
)

from src.weights.key_map import StackedExperts
from src.weights.random_source import RandomSource
from src.weights.side_files import architecture
from tests.checkpoints.tiny import SIDE_FILES, list_files, our_shapes


def save_checkpoint(directory: Path, config: dict[str, Any], experts_per_shard: int, world_size: int = 2) -> None:
    """Random masters of `config`'s model, and the Hugging Face files beside them."""
    shapes = our_shapes(config, experts_per_shard)
    source = StackedExperts(RandomSource(architecture(config), seed=0), shapes)
    buffers = {f"model.{name}": torch.randn(shape) for name, shape in shapes.items() if name.endswith("bias")}
    trained = {name: shape for name, shape in shapes.items() if f"model.{name}" not in buffers}
    folder = directory / "checkpoint"
    (directory / "hf").mkdir(parents=True)
    folder.mkdir()
    (directory / "latest").write_text("checkpoint")
    for name, text in (SIDE_FILES | {"config.json": json.dumps(config)}).items():
        (directory / "hf" / name).write_text(text)
    for rank in range(world_size):
        model = {
            "module": buffers,
            BUFFER_NAMES: list(buffers),
            PARAM_SHAPES: [{f"model.{name}": torch.Size(shape) for name, shape in trained.items()}],
        }
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        optimizer = {
            ZERO_STAGE: 3,
            PARTITION_COUNT: world_size,
            FP32_FLAT_GROUPS: [_partitions(source, trained, rank, world_size)],
        }
        torch.save({OPTIMIZER_STATE_DICT: optimizer}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    list_files(directory)


def _partitions(
    source: StackedExperts, shapes: Mapping[str, tuple[int, ...]], rank: int, world_size: int
) -> torch.Tensor:
    """Rank `rank`'s range of each flattened parameter, one after the other, padded."""
    sizes = {name: -(-math.prod(shape) // world_size) for name, shape in shapes.items()}
    flat = torch.zeros(sum(sizes.values()))
    for (name, shape), part in zip(shapes.items(), flat.split(list(sizes.values())), strict=True):
        start = min(rank * sizes[name], math.prod(shape))
        stop = min(start + sizes[name], math.prod(shape))
        part[: stop - start] = source.read(name, start, stop)
    return flat
