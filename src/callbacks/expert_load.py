"""How evenly the routed experts of each MoE layer are used, as scalars and as a heat map."""

from typing import Any, Protocol, cast

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import DeepseekV3Config
from typing_extensions import override

from src.errors import UserError

from .loggers import log_image

FloatArray = npt.NDArray[np.float64]

CELL = 6  # pixels of an expert's square in the heat map


class RoutedModule(Protocol):
    """What this callback reads of the LightningModule; src.models.sft_module.SFTModule has it."""

    config: DeepseekV3Config
    expert_load: Tensor | None


class ExpertLoad(pl.Callback):
    """After each optimizer step, logs how the step's tokens were spread over the experts.

    For each MoE layer, NN the decoder layer's index (the multi-token prediction's is the last):

    - `expert_load/max_over_mean/layer_NN`: the busiest expert's tokens over the experts' mean. 1 is even; the
      maximum is experts / experts per token, where the same few get every token.
    - `expert_load/entropy/layer_NN`: entropy of the experts' shares of the load, -sum p log p, divided by that of an
      even load, log(experts): 1 is even, 0 all on one expert.

    - `expert_load/ranks_max_over_mean/layer_NN`, where ranks share the experts (`expert_parallel_size` above 1): the
      rows of the experts that the busiest rank of a group has over the ranks' mean. All groups' rows are counted
      together; a single group may be less even.

    Without a layer the names are means over the layers; with `_worst` appended, the least even layer's value.

    The heat map `expert_load/heat_map` has a row per layer and a column per expert, coloured by the expert's load over
    its layer's mean: blue 0, white 1, red 2 and above.

    Args:
        heat_map_every_n_steps: optimizer steps from one heat map to the next, the first after the first step; 0 draws
            none. Loggers that show pictures get them: TensorBoard, Weights & Biases.

    Raises:
        ValueError: heat_map_every_n_steps is negative.
    """

    def __init__(self, heat_map_every_n_steps: int = 50) -> None:
        if heat_map_every_n_steps < 0:
            raise UserError(f"heat_map_every_n_steps is {heat_map_every_n_steps}; it must be 0 (never) or more.")
        self.heat_map_every_n_steps = heat_map_every_n_steps
        self._step = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of accumulation
        self._step = trainer.global_step
        routed = cast(RoutedModule, pl_module)
        if routed.expert_load is None:
            return  # a model without MoE layers
        load = routed.expert_load.double().cpu().numpy()  # [layers, E]
        # MoE layers follow the dense ones without a gap, the multi-token prediction's block included.
        first = routed.config.first_k_dense_replace
        shared = getattr(trainer.strategy, "expert_parallel_size", 1)
        for name, value in scalars(load, first, shared).items():
            pl_module.log(name, value)
        every = self.heat_map_every_n_steps
        if trainer.is_global_zero and every and (self._step - 1) % every == 0:
            log_image(trainer, "expert_load/heat_map", heat_map(load), self._step)


def scalars(load: FloatArray, first_layer: int, ranks: int = 1) -> dict[str, float]:
    """The scalars by name. load: [layers, E], first row decoder layer `first_layer`; ranks: that share the experts."""
    share = load / load.sum(1, keepdims=True)
    terms = share * np.log(share, out=np.zeros_like(share), where=share > 0)  # 0 log 0 = 0
    max_over_mean = load.max(1) / load.mean(1)
    entropy = -terms.sum(1) / np.log(load.shape[1])
    values = {
        "expert_load/max_over_mean": max_over_mean.mean(),
        "expert_load/max_over_mean_worst": max_over_mean.max(),
        "expert_load/entropy": entropy.mean(),
        "expert_load/entropy_worst": entropy.min(),
    }
    of_ranks = load.reshape(len(load), ranks, -1).sum(2)
    ranks_max_over_mean = of_ranks.max(1) / of_ranks.mean(1)
    if ranks > 1:
        values["expert_load/ranks_max_over_mean"] = ranks_max_over_mean.mean()
        values["expert_load/ranks_max_over_mean_worst"] = ranks_max_over_mean.max()
    for index in range(len(load)):
        layer = f"layer_{first_layer + index:02d}"
        values[f"expert_load/max_over_mean/{layer}"] = max_over_mean[index]
        values[f"expert_load/entropy/{layer}"] = entropy[index]
        if ranks > 1:
            values[f"expert_load/ranks_max_over_mean/{layer}"] = ranks_max_over_mean[index]
    return {name: float(value) for name, value in values.items()}


def heat_map(load: FloatArray) -> npt.NDArray[np.uint8]:
    """load [layers, E] -> RGB picture [layers * CELL, E * CELL, 3]; see `ExpertLoad` for its colours."""
    relative = load / load.mean(1, keepdims=True)
    blue, white, red = (33, 102, 172), (255, 255, 255), (178, 24, 43)
    channels = [np.interp(relative, (0, 1, 2), ramp) for ramp in zip(blue, white, red, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
