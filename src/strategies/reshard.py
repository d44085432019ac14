"""A run's training state from a checkpoint of any layout: each rank reads, of the old shards, the ranges that it keeps.

World size, DP x SP, EP, ZeRO stage, offloading and experts_per_shard of the old run and of this one may all differ.
Where they do not, a rank reads its own file alone, and what it goes on with is the old bits.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from src.checkpoints.zero_reader import ZeroCheckpointSource
from src.errors import UserError
from src.units import counted
from src.weights.key_map import PerExpert, StackedExperts
from src.weights.load import Sink, elsewhere, fill, persistent, sink_of, stacked_view, unfit
from src.weights.source import raise_listed

from .fail_together import fail_together
from .masters import weights_follow
from .rounding import NEAREST, Rounding
from .zero_parts import part_of

_Moment = Literal["exp_avg", "exp_avg_sq"]
_MOMENTS: tuple[_Moment, ...] = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def restore(
    engine: DeepSpeedEngine, model: nn.Module, checkpoint: ZeroCheckpointSource, rounding: Rounding = NEAREST
) -> None:
    """Fills masters, moments, step counts, frozen parameters, buffers and the model's own weights, in place.

    Beyond what is filled it holds a few chunks, and no weights travel between ranks but those that DeepSpeed gathers
    after each step too: at stage 3 the small ones that it keeps whole, at stages 1 and 2 the model.

    Args:
        engine: of a training run that has not taken a step.
        model: what the engine trains, with names as in `src.weights.key_map`.
        checkpoint: its fp32 slot.
        rounding: how the model's own weights follow from the masters.

    Raises:
        ValueError: before anything is written, one list of the tensors that are not this model's, or that are trained
            in one of the two runs only; the optimizer is offloaded to NVMe.
    """
    if engine.zero_nvme_offload_optimizer():
        raise UserError("a run whose optimizer is offloaded to nvme cannot be resumed: offload it to cpu")
    with weights_follow(engine, model, rounding, checkpoint.step), fail_together():
        _restore(engine, model, checkpoint)


def _restore(engine: DeepSpeedEngine, model: nn.Module, checkpoint: ZeroCheckpointSource) -> None:
    """`restore` without the trained weights, which follow from the masters."""
    adam, tensors = engine.basic_optimizer, persistent(model)
    trained: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = elsewhere(model)
    weights, moments = _views(
        checkpoint, tensors, others, trained | {name: p for name, p in others.items() if p.requires_grad}
    )

    parts = {name: part for name, parameter in trained.items() if (part := part_of(engine, parameter)) is not None}
    sinks = [sink_of(weights, name, tensor) for name, tensor in tensors.items() if name not in trained]
    for name, part in parts.items():
        state = adam.state[part.flat]
        if not state:
            state |= _fresh_state(part.flat)
        state["step"] = _count(adam, part.flat, checkpoint.step)
        sinks.append(Sink(weights, name, part.of(part.flat), part.start))
        sinks += [Sink(moments[slot], name, part.of(state[slot]), part.start) for slot in _MOMENTS]
    fill(sinks, "Resuming")


def _views(
    checkpoint: ZeroCheckpointSource, tensors: dict[str, Any], others: dict[str, Any], trained: dict[str, Any]
) -> tuple[StackedExperts, dict[_Moment, StackedExperts]]:
    """The checkpoint's weights, and its moments by slot, in this run's names; others: what other ranks have of it."""
    weights, problems = stacked_view(PerExpert(checkpoint), tensors | others)
    problems = problems or unfit(tensors, weights)
    raise_listed(
        f"{checkpoint.path}: {counted(len(problems), 'tensor does', 'tensors do')} not fit this model; config.json in "
        "--model.pretrained must be the run's, and --model.mtp_loss_weight above 0 where it was:",
        problems,
    )
    moments: dict[_Moment, StackedExperts] = {}
    for slot in _MOMENTS:
        moments[slot], problems = stacked_view(PerExpert(checkpoint.at(slot)), trained)
        raise_listed(
            f"{checkpoint.path}: {counted(len(problems), 'tensor is', 'tensors are')} trained here and not there "
            "(missing), or the other way round (unexpected); set --model.freeze as it was:",
            problems,
        )
    return weights, moments


def _fresh_state(flat: Tensor) -> dict[str, Any]:
    """The moments that AdamW makes for a flat tensor at its first step."""
    return {slot: torch.zeros_like(flat) for slot in _MOMENTS}


def _count(adam: torch.optim.Optimizer, flat: Tensor, step: int) -> int | Tensor:
    """AdamW's count of steps as `adam` keeps it: DeepSpeed's in Python."""
    if isinstance(adam, torch.optim.AdamW):
        return torch.tensor(float(step), device=flat.device if adam.defaults["fused"] else "cpu")
    return step


def continue_rates(schedulers: Sequence[Any], saved: Sequence[dict[str, Any]]) -> None:
    """Sets each optimizer's rate to that of the saved step on its own schedule, and `saved` to what agrees with it.

    So the schedule is that of this run's settings, a lower learning rate takes effect, and only the step is the saved
    one. `saved` are the schedulers' states in a checkpoint, for whoever loads them afterwards.
    """
    for scheduler, state in zip(schedulers, saved, strict=True):
        assert isinstance(scheduler, LambdaLR), "a rate that depends on the step alone, as SFTModule's"
        factors = [factor(state["last_epoch"]) for factor in scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        state |= {"base_lrs": scheduler.base_lrs, "_last_lr": rates}


def optimizer_names(engine: DeepSpeedEngine) -> list[str] | None:
    """The trained parameters in the order in which AdamW numbers them at stage 0; the other stages record their own."""
    if engine.zero_optimization_stage() > 0:
        return None
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return [names[id(parameter)] for group in engine.basic_optimizer.param_groups for parameter in group["params"]]
