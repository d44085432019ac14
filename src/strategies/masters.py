"""fp32 masters that are true to the file, and the weights that follow from them.

DeepSpeed copies its masters from the model's own weights. Where these are bf16 and the file is not (FP8 dequantised,
fp32), the load has kept the lower halves of the values' bits apart; here they go into the masters, so that training
starts from the file's values to the bit, and the weights become the masters rounded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor, nn

from src.weights.load import halves

from .rounding import FlatRounding, Rounding, place_of
from .zero_parts import part_of, weights_of


@contextmanager
def weights_follow(engine: DeepSpeedEngine, model: nn.Module, rounding: Rounding, step: int) -> Iterator[None]:
    """Around what writes the masters of `step`: at the end the weights are these, rounded.

    Inside, at stage 3, every parameter is partitioned. No weights travel between ranks but those that DeepSpeed gathers
    after each step too: at stage 3 the small ones that it keeps whole, at stages 1 and 2 the model.
    """
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    yield
    if stage > 0:
        _round_all(engine, model, rounding, step)
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


@torch.no_grad()
def _round_all(engine: DeepSpeedEngine, model: nn.Module, rounding: Rounding, step: int) -> None:
    """Rounds this rank's masters to the weights; at stages 1 and 2 brings every rank those of the others."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (part := part_of(engine, parameter)) is not None:
            whole, first = place_of(name, parameter)
            weights = weights_of(parameter, part)
            rounding(part.of(part.flat).to(weights.device), weights, whole, first + part.start, step)
    if engine.zero_optimization_stage() < 3:
        zero: Any = engine.optimizer
        names = ("bf16_groups_flat", "bf16_partitioned_groups")
        if not hasattr(zero, names[0]):
            names = ("bit16_groups_flat", "parallel_partitioned_bit16_groups")
        flat, parts = (getattr(zero, name) for name in names)
        limits = zero.nccl_start_alignment_factor, zero.allgather_bucket_size
        all_gather_dp_groups(flat, parts, zero.real_dp_process_group, *limits)


def round_after_steps(engine: DeepSpeedEngine, model: nn.Module, rounding: Rounding) -> FlatRounding:
    """Has an engine's optimizer round the masters of each step by `rounding`; to the nearest it does by itself.

    Returns what rounds a range, for the step on the host (`host_optimizer`), which is to be told of it.
    """
    zero: Any = engine.optimizer
    flat = FlatRounding(engine, model, rounding)
    if rounding.kind == "nearest" or not engine.bfloat16_enabled():
        return flat
    if engine.zero_optimization_stage() == 3:

        def hand_over(sub_group: int) -> None:
            masters, weights = (
                g[sub_group] for g in (zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat)
            )
            flat(masters, 0, masters.data.to(weights.device), weights.data)
            zero._unflatten_partitioned_parameters(sub_group)

        zero._reassign_or_swap_out_partitioned_parameters = hand_over
        return flat
    step = zero.step

    def step_and_round(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        if not getattr(zero, "overflow", False):
            _round_all(engine, model, rounding, engine.global_steps + 1)

    zero.step = step_and_round
    return flat


@torch.no_grad()
def complete(engine: DeepSpeedEngine, model: nn.Module, low: dict[str, Tensor], rounding: Rounding) -> None:
    """Writes the lower halves that `src.weights.load.load` returned into the masters, and lets go of them.

    Args:
        engine: of a training run that has not taken a step, its masters copied from what was loaded.
        model: what was loaded, with names as in `low`.
        low: empty afterwards.
    """
    if not low:
        return
    with weights_follow(engine, model, rounding, step=0):
        for name, parameter in model.named_parameters():
            if name not in low:
                continue
            cut, part = low.pop(name), part_of(engine, parameter)
            if part is not None:
                own = cut if hasattr(parameter, "ds_tensor") else cut[part.start : part.start + part.numel]
                halves(part.of(part.flat))[:, 0].copy_(own)
