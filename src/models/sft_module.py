"""The LightningModule: the joint between the model's mathematics and ranks, ZeRO and weights.

It reaches those only through `self.trainer.strategy` (`parallelize`, `load`, `optimizer`, `gradient_norm`), and the
data only through its batches.
"""

import math
import os
from typing import Any, Literal, Protocol, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .deepseek_v3 import DeepseekV3ForCausalLM, load_config
from .kernels import ATTENTION
from .loss import IGNORE_INDEX
from .metrics import MeanByTarget

Batch = dict[str, Any]


class ModelStrategy(Protocol):
    """What this module asks of `trainer.strategy` beyond Lightning's own; src.strategies.DeepSpeedSPStrategy has it."""

    def parallelize(self, model: DeepseekV3ForCausalLM, activation_checkpointing: bool) -> None: ...
    def load(self, model: DeepseekV3ForCausalLM, directory: str) -> None: ...
    def initialise(self, model: DeepseekV3ForCausalLM, seed: int) -> None: ...
    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> Optimizer: ...
    @property
    def gradient_norm(self) -> float | None: ...


def _targets(batch: Batch) -> Tensor:
    """How many of this rank's tokens are targets."""
    return (batch["labels"] != IGNORE_INDEX).sum()


class SFTModule(pl.LightningModule):
    """Supervised fine-tuning of a DeepSeek-V3 model on packed rows.

    The gradient of an optimizer step is that of (sum of its targets' cross-entropies) / (number of its targets), over
    data-parallel ranks, sequence-parallel ranks and accumulated micro-steps alike.

    Args:
        pretrained: Hugging Face directory of a DeepSeek-V3 model, BF16 or FP8.
        from_scratch: read only its config.json and start from random weights (seed_everything decides them).
        learning_rate: AdamW's, after warm-up.
        min_learning_rate: where the cosine ends.
        betas: AdamW's; its eps is 1e-8.
        weight_decay: on matrices; norms and biases have none.
        warmup_ratio: the part of all optimizer steps over which the rate rises linearly.
        activation_checkpointing: keep each layer's input alone and compute the rest again in the backward pass.
        experts_per_shard: routed experts that ZeRO-3 gathers at once; `auto` takes about an eighth of a layer's.
        attention_kernel: auto, flash_attn_4 (Hopper, bf16), varlen (CUDA, bf16) or sdpa.

    Raises:
        ValueError: the config.json is absent, of another architecture or asks for what is not implemented; a value is
            out of its range.
    """

    def __init__(
        self,
        pretrained: str,
        from_scratch: bool = False,
        learning_rate: float = 1e-5,
        min_learning_rate: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        activation_checkpointing: bool = True,
        experts_per_shard: int | Literal["auto"] = "auto",
        attention_kernel: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= min_learning_rate <= learning_rate:
            raise ValueError(
                f"min_learning_rate {min_learning_rate} is not between 0 and learning_rate {learning_rate}."
            )
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio {warmup_ratio} is not in [0, 1): it is a part of all optimizer steps.")
        if attention_kernel not in ("auto", *ATTENTION):
            raise ValueError(f"attention_kernel {attention_kernel!r} is none of auto, {', '.join(ATTENTION)}.")
        self.config = load_config(pretrained)
        self.pretrained = pretrained
        self.from_scratch = from_scratch
        self.learning_rate = learning_rate
        self.min_learning_rate = min_learning_rate
        self.betas = betas
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.activation_checkpointing = activation_checkpointing
        self.experts_per_shard = None if experts_per_shard == "auto" else experts_per_shard
        self.attention_kernel = attention_kernel
        self.model: DeepseekV3ForCausalLM | None = None
        self.train_loss = MeanByTarget()
        self.val_loss = MeanByTarget()
        self.val_accuracy = MeanByTarget()
        self._logged_step = 0

    # -- building -------------------------------------------------------------------------------------------------

    @property
    def _strategy(self) -> ModelStrategy:
        return cast(ModelStrategy, self.trainer.strategy)

    def configure_model(self) -> None:
        if self.model is not None:
            return
        strategy, checkpoint = self._strategy, self.trainer.ckpt_path
        if not hasattr(strategy, "parallelize"):
            raise ValueError(
                f"the strategy {type(strategy).__name__} cannot hold this model; "
                "set trainer.strategy.class_path to src.strategies.DeepSpeedSPStrategy."
            )
        with torch.device("meta"):
            self.model = DeepseekV3ForCausalLM(self.config, self.experts_per_shard)
        self.model.set_attention_kernel(self.attention_kernel)
        strategy.parallelize(self.model, self.activation_checkpointing)
        if self.trainer.state.fn == "fit" and checkpoint is not None:
            return  # resumed: the checkpoint holds every weight
        if checkpoint is not None:
            strategy.load(self.model, str(checkpoint))
        elif self.from_scratch:
            strategy.initialise(self.model, int(os.environ.get("PL_GLOBAL_SEED", 0)))
        else:
            strategy.load(self.model, self.pretrained)

    def configure_optimizers(self) -> Any:
        assert self.model is not None
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        # By name, since under ZeRO-3 every parameter is one-dimensional.
        undecayed = [p for name, p in named if name.endswith((".bias", "norm.weight"))]
        decayed = [p for name, p in named if not name.endswith((".bias", "norm.weight"))]
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        optimizer = self._strategy.optimizer(groups, lr=self.learning_rate, betas=self.betas, eps=1e-8)
        scheduler = LambdaLR(optimizer, self._rate_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate_at(self, step: int) -> float:
        """Factor on learning_rate of 0-based optimizer step `step`: linear warm-up, then a cosine to the minimum."""
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = math.ceil(self.warmup_ratio * total)
        if step < warmup:
            return (step + 1) / warmup
        floor = self.min_learning_rate / self.learning_rate if self.learning_rate else 0.0
        progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    # -- steps ----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        self._logged_step = self.trainer.global_step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        sums = self._forward(batch)
        self.train_loss.update(sums.loss, _targets(batch))
        # This micro-batch's share of the step's mean; Lightning divides by the accumulation, which is in it already.
        share = sums.loss / batch["step_targets"]
        return share * self.trainer.accumulate_grad_batches

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        sums = self._forward(batch)
        self.val_loss.update(sums.loss, _targets(batch))
        self.val_accuracy.update(sums.correct, _targets(batch))

    def _forward(self, batch: Batch) -> Any:
        assert self.model is not None
        return self.model(batch["input_ids"], batch["labels"], batch["cu_seqlens"], batch["max_seqlen"])

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.trainer.global_step == self._logged_step:
            return  # in the middle of accumulation
        self._logged_step = self.trainer.global_step
        self.log("train/loss", self.train_loss.compute(), prog_bar=True)
        self.train_loss.reset()
        gradient_norm = self._strategy.gradient_norm
        if gradient_norm is not None:
            self.log("train/grad_norm", gradient_norm)

    def on_validation_epoch_end(self) -> None:
        loss = self.val_loss.compute()
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/perplexity", loss.exp())
        self.log("val/accuracy", self.val_accuracy.compute())
        self.val_loss.reset()
        self.val_accuracy.reset()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The only hook that sees a checkpoint before the trainer's loops do.
        restore_progress = getattr(self.trainer.datamodule, "restore_progress", None)  # type: ignore[attr-defined]
        if restore_progress is not None:
            restore_progress(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.pop("state_dict", None)  # ZeRO's shards hold the weights
