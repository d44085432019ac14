"""How much of the training the forward pass sees, as a curve."""

import logging
from collections.abc import Callable
from typing import Any, Protocol, cast

import lightning.pytorch as pl
from transformers import DeepseekV3Config
from typing_extensions import override

from src.errors import UserError
from src.weights.hf_reader import HFDirectorySource
from src.weights.kept import Kept
from src.weights.random_source import RandomSource
from src.weights.source import WeightSource

log = logging.getLogger(__name__)


class SamplingStrategy(Protocol):
    """What this callback asks of the strategy; src.strategies.DeepSpeedSPStrategy has it."""

    def sample_changes(self, base: WeightSource) -> Callable[[], Kept] | None: ...


class StartedModule(Protocol):
    """What it reads of the LightningModule; src.models.sft_module.SFTModule has it."""

    config: DeepseekV3Config
    pretrained: str
    from_scratch: bool
    seed: int


class RoundingKept(pl.Callback):
    """Logs what rounding to bf16 leaves of the change that training has made to the fp32 masters, on a sample.

    - `rounding/kept`: the weights' change along the masters', both from the base. 1: the forward pass sees all of the
      training on average; 0: it computes with the base.
    - `rounding/error`: what single weights are off by, relative to their change.

    A resumed run reads the sample of the base again. Without it, or in fp32, nothing is logged.

    Args:
        every_n_steps: optimizer steps between measurements; 0: none.

    Raises:
        ValueError: every_n_steps is negative.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 0:
            raise UserError(f"rounding.every_n_steps is {every_n_steps}; it must be 0 (never) or more.")
        self.every_n_steps = every_n_steps
        self._compare: Callable[[], Kept] | None = None
        self._step = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if not self.every_n_steps or not hasattr(trainer.strategy, "sample_changes"):
            return
        module = cast(StartedModule, pl_module)
        error, compare = None, None
        try:
            base: WeightSource = (
                RandomSource(module.config, module.seed)
                if module.from_scratch
                else HFDirectorySource(module.pretrained)
            )
            compare = cast(SamplingStrategy, trainer.strategy).sample_changes(base)
        except (ValueError, OSError) as found:
            error = str(found)
        # Comparing is a collective: if one rank cannot read the base, none compares.
        if trainer.strategy.reduce_boolean_decision(error is None, all=True):
            self._compare = compare
        elif error is not None:
            log.warning("rounding/kept is not logged: the base in %s cannot be read: %s", module.pretrained, error)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self._compare is None or step == self._step or step % self.every_n_steps:
            return
        self._step = step  # repeated within accumulation
        kept = self._compare()
        if kept.change:
            pl_module.log("rounding/kept", kept.part)
            pl_module.log("rounding/error", kept.relative_error)
