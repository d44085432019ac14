"""fp32 masters that are true to the file, and the weights that follow from them.

DeepSpeed copies its masters from the model's own weights. Where these are bf16 and the file is not (FP8 dequantised,
fp32), the load has kept the lower halves of the values' bits apart; here they go into the masters, so that training
starts from the file's values to the bit, and the weights become the masters rounded.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from src.checkpoints.load import halves

from .zero_parts import part_of, weights_of


@contextmanager
def weights_follow(engine: DeepSpeedEngine, model: nn.Module) -> Iterator[None]:
    """Around what writes masters: at stage 3 every parameter is partitioned, at the end weights are masters rounded.

    No weights travel between ranks but those that DeepSpeed gathers after each step too: at stage 3 the small ones that
    it keeps whole, at stages 1 and 2 the model.
    """
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    yield
    if stage == 3:
        for parameter in model.parameters():
            if parameter.requires_grad and (part := part_of(engine, parameter)) is not None:
                weights_of(parameter, part).copy_(part.of(part.flat))
        engine.optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        engine.optimizer.update_lp_params()


@torch.no_grad()
def complete(engine: DeepSpeedEngine, model: nn.Module, low: dict[str, Tensor]) -> None:
    """Writes the lower halves that `src.checkpoints.load.load` returned into the masters, and lets go of them.

    Args:
        engine: of a training run that has not taken a step, its masters copied from what was loaded.
        model: what was loaded, with names as in `low`.
        low: empty afterwards.
    """
    if not low:
        return
    with weights_follow(engine, model):
        for name, parameter in model.named_parameters():
            if name not in low:
                continue
            cut, part = low.pop(name), part_of(engine, parameter)
            if part is not None:
                own = cut if hasattr(parameter, "ds_tensor") else cut[part.start : part.start + part.numel]
                halves(part.of(part.flat))[:, 0].copy_(own)
