"""Where DeepSpeed keeps this rank's part of a trained parameter's optimizer state: every private name for it is here.

DeepSpeed (0.19.8) keeps the fp32 masters in flat tensors, by which AdamW's moments hang too, and tells where in them a
parameter's elements are:

    stage 3       its partition, whole, somewhere in one flat tensor (`grad_position`)
    stages 1, 2   the part of it that falls into this rank's part of the group's concatenation, if any (`_hp_mapping`)
    stage 0       the parameter is its own master

Its public `safe_set_local_*` do not serve: they know stage 3 alone, take a whole partition, which on few ranks is much
of the largest tensor, and want moments that exist, which before the first step they do not.
"""

from dataclasses import dataclass
from typing import Any

from deepspeed import DeepSpeedEngine
from torch import Tensor

from src.weights.load import partition_range


@dataclass(frozen=True)
class Part:
    """Elements [start, start + numel) of the flattened parameter, which are at `offset` of a flat tensor."""

    flat: Tensor
    offset: int
    start: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """The part [numel] in a tensor that is laid out as the flat one, a view."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)


def part_of(engine: DeepSpeedEngine, parameter: Any) -> Part | None:
    """This rank's part of a parameter that the engine trains; None where it has none."""
    if hasattr(parameter, "ds_tensor"):
        zero = engine.optimizer
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        return Part(zero.fp32_partitioned_groups_flat[group], offset, *partition_range(parameter))
    if not hasattr(parameter, "_hp_mapping"):
        return Part(parameter, 0, 0, parameter.numel())
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    (flat,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
    inside = mapping.lp_fragment_address
    return Part(flat, mapping.hp_fragment_address.start, inside.start, inside.numel)


def weights_of(parameter: Any, part: Part) -> Tensor:
    """The model's own weights [numel] of a part of `parameter`, a view. At stage 3 it is to be partitioned."""
    if hasattr(parameter, "ds_tensor"):
        weights: Tensor = parameter.ds_tensor.detach().view(-1)[: part.numel]
        return weights
    whole: Tensor = parameter.detach().view(-1)
    return whole.narrow(0, part.start, part.numel)
