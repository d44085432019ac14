"""What the LightningModule asks of `trainer.strategy` beyond Lightning's own."""

from typing import Any, Protocol

from torch.optim import Optimizer

from .deepseek_v3 import DeepseekV3ForCausalLM


class ModelStrategy(Protocol):
    """src.strategies.DeepSpeedSPStrategy is one, and documents each."""

    expert_parallel_size: int

    def parallelize(self, model: DeepseekV3ForCausalLM, activation_checkpointing: bool) -> None: ...
    def load(self, model: DeepseekV3ForCausalLM, directory: str) -> None: ...
    def initialise(self, model: DeepseekV3ForCausalLM, seed: int) -> None: ...
    def optimizer(
        self, groups: list[dict[str, Any]], weight_rounding: Any, seed: int, **settings: Any
    ) -> Optimizer: ...
    @property
    def gradient_norm(self) -> float | None: ...
    @property
    def guards_gradient(self) -> bool: ...
    @property
    def skipped_step(self) -> bool: ...
