"""What the forward pass sees of the training, for a sample: weights beside masters beside the base."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from src.weights.kept import Kept
from src.weights.load import stacked_view
from src.weights.source import WeightSource, raise_listed

from .zero_parts import part_of, weights_of

TENSORS, ELEMENTS = 64, 2**14  # of a rank at most: 4 MiB of base


@dataclass(frozen=True)
class _Sample:
    parameter: Any
    before: Tensor  # fp32 [n], the base's first values of this rank's part


def sample_changes(
    engine: DeepSpeedEngine, model: nn.Module, base: WeightSource, device: torch.device
) -> Callable[[], Kept] | None:
    """Keeps the base's values of some weights; what it returns compares them, summed over ranks, for all to call.

    TENSORS of the trained parameters, evenly over their order, and ELEMENTS of this rank's part of each.

    Args:
        engine: of a training run.
        model: with names as in `src.weights.key_map`.
        base: what it started from, in Hugging Face names.
        device: where the process group communicates.

    Returns:
        None where nothing is rounded: weights in fp32.

    Raises:
        ValueError: a weight is not in the base in its shape.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.bfloat16}
    if not trained:
        return None
    names = list(trained)[:: -(-len(trained) // TENSORS)]
    view, problems = stacked_view(base, {name: trained[name] for name in names}, unneeded=lambda name: True)
    raise_listed("the base is not this model's:", problems)
    samples = []
    for name in names:
        part = part_of(engine, trained[name])
        if part is not None and part.numel:
            before = view.read(name, part.start, part.start + min(part.numel, ELEMENTS)).float()
            samples.append(_Sample(trained[name], before))

    @torch.no_grad()
    def compare() -> Kept:
        kept = Kept()
        for sample in samples:
            part, count = part_of(engine, sample.parameter), len(sample.before)
            assert part is not None
            weights, masters = (
                t[:count].cpu().float() for t in (weights_of(sample.parameter, part), part.of(part.flat))
            )
            kept.add(weights - sample.before.bfloat16().float(), masters - sample.before)
        sums = torch.tensor([kept.along, kept.change, kept.error], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return Kept(*sums.tolist())

    return compare
