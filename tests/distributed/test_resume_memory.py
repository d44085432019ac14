"""What resuming on another layout holds beyond the state that is kept: a few chunks, however large the model is."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import PeakAnonymous
from src.checkpoints.zero_reader import ZeroCheckpointSource
from src.strategies.reshard import restore
from src.weights import load
from src.weights.source import chunks
from tests.checkpoints.tiny import StandIn, our_shapes
from tests.checkpoints.workers import Setting, Wrapper
from tests.weights.test_memory import CHUNK, MIB, WIDTHS, config

from .spawn import run_distributed

SETTING = Setting(stage=3)


def engine_of(width: int) -> Any:
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=SETTING.deepspeed_config()):
        model: Any = Wrapper(StandIn(our_shapes(config(width), 2)))
    for parameter in model.parameters():
        parameter.ds_tensor.fill_(0.02)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, config=SETTING.deepspeed_config(), optimizer=optimizer)
    return engine


def save(folder: Path) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    for width in (WIDTHS[0], WIDTHS[-1]):
        engine = engine_of(width)
        engine.backward(engine())
        engine.step()
        engine.save_checkpoint(str(folder / str(width)), tag="checkpoint")


def growths(folder: Path) -> list[int]:
    """Bytes at the peak beyond the moments, which are made, for a small model and one twelve times as large."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    load.chunks = functools.partial(chunks, step=CHUNK)
    found = []
    for width in (WIDTHS[0], WIDTHS[-1]):
        engine, checkpoint = engine_of(width), ZeroCheckpointSource(folder / str(width))
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, and not be seen to grow
        with PeakAnonymous() as peak:
            restore(engine, engine.module.model, checkpoint)
        states = engine.basic_optimizer.state.values()
        found.append(peak.growth - sum(state[slot].nbytes for state in states for slot in ("exp_avg", "exp_avg_sq")))
    return found


def test_what_resuming_holds_beyond_the_state_does_not_grow_with_the_model(tmp_path: Path) -> None:
    run_distributed(save, 2, tmp_path)
    ((small, large),) = run_distributed(growths, 1, tmp_path)
    assert large < small + 16 * MIB
