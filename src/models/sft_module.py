"""The LightningModule: the joint between the model's mathematics and ranks, ZeRO and weights.

It reaches those only through `self.trainer.strategy` (`parallelize`, `load`, `optimizer`, `gradient_norm`), and the
data only through its batches.
"""

import functools
import math
import os
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from src.errors import UserError

from .deepseek_v3 import DeepseekV3ForCausalLM, Losses, LossWeights, load_config
from .deepseek_v3.config_json import mtp_loss_weight_of
from .deepseek_v3.freezing import frozen
from .deepseek_v3.sizes import shard_size
from .kernels import ATTENTION
from .learning_rate import warmup_cosine
from .loss import IGNORE_INDEX
from .metrics import MeanByTarget, ValidationMetrics
from .strategy import ModelStrategy

Batch = dict[str, Any]


def _targets(labels: Tensor) -> Tensor:
    """How many of this rank's tokens are targets."""
    return (labels != IGNORE_INDEX).sum()


class SFTModule(pl.LightningModule):
    """Supervised fine-tuning of a DeepSeek-V3 model on packed rows.

    The gradient of an optimizer step is that of (sum of its targets' cross-entropies) / (number of its targets), over
    data-parallel ranks, sequence-parallel ranks and accumulated micro-steps alike.

    Args:
        pretrained: Hugging Face directory of a DeepSeek-V3 model, BF16 or FP8.
        from_scratch: read only its config.json and start from random weights, seeded by seed_everything.
        learning_rate: of AdamW, after warm-up.
        min_learning_rate: the learning rate at the end of the cosine.
        betas: of AdamW; its eps is 1e-8.
        weight_decay: of matrices; norms and biases have none.
        warmup_ratio: fraction of all optimizer steps over which the learning rate rises linearly.
        weight_rounding: rounding of fp32 masters to bf16 weights after a step: `nearest`, or `stochastic`, seeded by
            seed_everything and the same on every layout. fp32 rounds nothing; NVMe rounds to the nearest.
        mtp_loss_weight: weight of the MTP loss relative to the next-token loss; 0 does not build the block. None: 0.1
            if the base has the block, else 0. Here config.json (num_nextn_predict_layers) says whether it does; `fit`
            checks the weights too (src/commands/mtp_weight.py).
        aux_loss_alpha: weight of the sequence-wise balance loss; 0 turns it off.
        router_bias_update_speed: step of each router bias towards balance after an optimizer step; 0 leaves the biases
            as they are.
        freeze: patterns (`*`, `?`) of published parameter names to leave untrained, e.g. "model.embed_tokens*" or
            "model.layers.3.mlp.experts.*". Experts of one shard (experts_per_shard) are frozen together.
        activation_checkpointing: keep only each layer's input and recompute the rest in the backward pass.
        experts_per_shard: routed experts that ZeRO-3 gathers together; `auto`: as many as fit into 3 GB.
        attention_kernel: auto, flash_attn_4 (Hopper, bf16), varlen (CUDA, bf16) or sdpa.
        attention_output: under activation checkpointing, `recompute` each layer's attention output, `keep` it on the
            device or `offload` it to pinned host memory. In bf16 it takes 2 x (heads x v_head_dim + hidden_size) +
            4 x heads bytes per token and layer.
        layer_input: `keep` each layer's input on the device (2 x hidden_size bytes per token and layer), or `offload`
            it to pinned host memory.

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
        weight_rounding: Literal["nearest", "stochastic"] = "stochastic",
        mtp_loss_weight: float | None = None,
        aux_loss_alpha: float = 1e-4,
        router_bias_update_speed: float = 0.0,
        freeze: list[str] | None = None,
        activation_checkpointing: bool = True,
        experts_per_shard: int | Literal["auto"] = "auto",
        attention_kernel: str = "auto",
        attention_output: Literal["keep", "offload", "recompute"] = "recompute",
        layer_input: Literal["keep", "offload"] = "keep",
    ) -> None:
        super().__init__()
        if not 0 <= min_learning_rate <= learning_rate:
            raise UserError(
                f"min_learning_rate {min_learning_rate} is not between 0 and learning_rate {learning_rate}."
            )
        if not 0 <= warmup_ratio < 1:
            raise UserError(f"warmup_ratio {warmup_ratio} is not in [0, 1): it is a part of all optimizer steps.")
        self.config = load_config(pretrained)
        has_mtp = bool(self.config.num_nextn_predict_layers)
        self.mtp_loss_weight = mtp_loss_weight_of(mtp_loss_weight, has_mtp, f"{pretrained}/config.json")
        for name, value in (
            ("mtp_loss_weight", self.mtp_loss_weight),
            ("aux_loss_alpha", aux_loss_alpha),
            ("router_bias_update_speed", router_bias_update_speed),
        ):
            if value < 0:
                raise UserError(f"{name} is {value}; it is 0 (off) or positive.")
        if attention_kernel not in ("auto", *ATTENTION):
            raise UserError(f"attention_kernel {attention_kernel!r} is none of auto, {', '.join(ATTENTION)}.")
        self.pretrained = pretrained
        self.from_scratch = from_scratch
        self.learning_rate = learning_rate
        self.min_learning_rate = min_learning_rate
        self.betas = betas
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.weight_rounding = weight_rounding
        self.aux_loss_alpha = aux_loss_alpha
        self.router_bias_update_speed = router_bias_update_speed
        self.freeze_patterns = freeze or []
        self.activation_checkpointing = activation_checkpointing
        self.experts_per_shard = None if experts_per_shard == "auto" else experts_per_shard
        self.attention_kernel = attention_kernel
        self.attention_output = attention_output
        self.layer_input = layer_input
        self.model: DeepseekV3ForCausalLM | None = None
        self._step_sources: list[str] = []  # rows of this rank's micro-batches since the last optimizer step
        self.expert_load: Tensor | None = None  # of the last optimizer step, int64 [MoE layers, E]
        self.train_loss = MeanByTarget()
        self.train_accuracy = MeanByTarget()
        self.train_mtp_loss = MeanByTarget()
        self.train_balance = MeanByTarget()
        self.validation = ValidationMetrics()

    # -- building -------------------------------------------------------------------------------------------------

    @property
    def _strategy(self) -> ModelStrategy:
        return cast(ModelStrategy, self.trainer.strategy)

    @property
    def seed(self) -> int:
        """seed_everything's."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        strategy, checkpoint = self._strategy, self.trainer.ckpt_path
        if not hasattr(strategy, "parallelize"):
            raise UserError(
                f"the strategy {type(strategy).__name__} cannot hold this model; "
                "set trainer.strategy.class_path to src.strategies.DeepSpeedSPStrategy."
            )
        with torch.device("meta"):
            self.model = DeepseekV3ForCausalLM(self.config, self._shard_size(), self.mtp_loss_weight > 0)
        self._freeze(self.model)
        self.model.set_balance(self.aux_loss_alpha > 0)
        self.model.set_attention_kernel(self.attention_kernel)
        if self.activation_checkpointing:
            self.model.set_kept(self.attention_output, self.layer_input)
        strategy.parallelize(self.model, self.activation_checkpointing)
        longest = getattr(self.trainer.datamodule, "longest_row", 0)  # type: ignore[attr-defined]
        self.model.host.longest = -(-longest // self.model.sp.size)
        if self.trainer.state.fn == "fit" and checkpoint is not None:
            return  # resumed: the checkpoint holds every weight
        if checkpoint is not None:
            strategy.load(self.model, str(checkpoint))
        elif self.from_scratch:
            strategy.initialise(self.model, self.seed)
        else:
            strategy.load(self.model, self.pretrained)

    def _shard_size(self) -> int:
        config, shared = self.config, self._strategy.expert_parallel_size
        widths = config.hidden_size, config.moe_intermediate_size
        return shard_size(config.n_routed_experts, *widths, self.experts_per_shard, shared)

    def _freeze(self, model: DeepseekV3ForCausalLM) -> None:
        parameters = dict(model.named_parameters())
        for name in frozen(parameters, self.freeze_patterns, model.experts_per_shard):
            parameters[name].requires_grad_(False)

    @override
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
        groups = [group for group in groups if group["params"]]  # DeepSpeed drops an empty one, the scheduler would not
        if not groups:
            raise UserError(f"freeze {self.freeze_patterns} leaves no parameter to train.")
        adam = {"lr": self.learning_rate, "betas": self.betas, "eps": 1e-8}
        optimizer = self._strategy.optimizer(groups, self.weight_rounding, self.seed, **adam)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        floor = self.min_learning_rate / self.learning_rate if self.learning_rate else 0.0
        rate = functools.partial(warmup_cosine, total=total, warmup=math.ceil(self.warmup_ratio * total), floor=floor)
        scheduler = LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- steps ----------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self._forward(
            batch,
            LossWeights(
                cross_entropy=1 / batch["step_targets"],
                mtp=self.mtp_loss_weight / max(1, batch["step_mtp_targets"]),
                balance=self.aux_loss_alpha / batch["step_tokens"],
            ),
        )
        self._refuse_non_finite_loss(losses, batch)
        self.train_loss.update(losses.cross_entropy, _targets(batch["labels"]))
        self.train_accuracy.update(losses.correct, _targets(batch["labels"]))
        self.train_mtp_loss.update(losses.mtp, _targets(batch["mtp_labels"]))
        self.train_balance.update(losses.balance, (batch["document_ids"] >= 0).sum())
        # This micro-batch's share of the step's means; Lightning divides by the accumulation, which is in them already.
        return losses.loss * self.trainer.accumulate_grad_batches

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        losses = self._forward(batch, LossWeights())
        targets = _targets(batch["labels"])
        self.validation.update(batch.get("val_set"), losses.cross_entropy, losses.correct, targets)

    @override
    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Logits, as `DeepseekV3ForCausalLM.logits` has them; under ZeRO-3 for all ranks to call together."""
        assert self.model is not None
        return self.model.logits(input_ids, cu_seqlens, max_seqlen)

    def _forward(self, batch: Batch, weights: LossWeights) -> Losses:
        assert self.model is not None
        names = ("input_ids", "labels", "cu_seqlens", "max_seqlen", "document_ids", "mtp_input_ids", "mtp_labels")
        return self.model(**{name: batch[name] for name in names}, weights=weights)

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._ends_step(batch_idx):  # here, before any callback saves a checkpoint
            self._refuse_non_finite_gradient(self._strategy.skipped_step)
            self._step_sources = []
            self._update_router_biases()

    def _ends_step(self, batch_idx: int) -> bool:
        """Whether this micro-batch is an optimizer step's last; an epoch has whole steps."""
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    def _refuse_non_finite_loss(self, losses: Losses, batch: Batch) -> None:
        """Raises on every rank where any rank's loss is not finite, before its gradient is computed."""
        self._step_sources += batch["sources"]
        bad = self.trainer.strategy.reduce((~losses.loss.detach().isfinite()).float(), reduce_op="sum")
        if bad == 0:
            return
        documents = batch["document_ids"][~losses.token_losses.isfinite()].unique().tolist()
        if documents:
            rows = ", ".join(batch["sources"][index] for index in documents)
        elif not losses.loss.isfinite():  # the multi-token prediction's or the balance loss
            rows = "one of " + ", ".join(batch["sources"])
        else:
            rows = "none; see the other ranks' messages"
        raise FloatingPointError(
            f"optimizer step {self.trainer.global_step + 1}: the loss is not finite, on {int(bad)} of "
            f"{self.trainer.world_size} ranks; here at {rows}. The weights are as the last step left them: look at "
            "these rows; resume from the last checkpoint with a lower learning rate, or train its export without them."
        )

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if not self._strategy.guards_gradient:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self._refuse_non_finite_gradient(not all(g.isfinite().all() for g in gradients))

    def _refuse_non_finite_gradient(self, not_finite: bool) -> None:
        """Raises where the gradient was found not to be finite before it touched the weights."""
        if not_finite:
            rows, more = self._step_sources[:20], len(self._step_sources) - 20
            raise FloatingPointError(
                f"optimizer step {self.trainer.global_step + 1}: the gradient is not finite though the loss is; the "
                f"weights are as the last step left them. This rank's rows were {', '.join(rows)}"
                + (f" and {more} more." if more > 0 else ".")
            )

    @torch.no_grad()
    def _update_router_biases(self) -> None:
        """Auxiliary-loss-free balancing (arXiv 2408.15664): a bias moves by the sign of its expert's load violation."""
        assert self.model is not None
        routers = self.model.routers
        if not routers:
            return
        # [layers, E], of the whole step: every rank counted its own tokens
        load = self.trainer.strategy.reduce(torch.stack([r.load for r in routers]), reduce_op="sum")
        for router, own in zip(routers, load, strict=True):
            violation = torch.sign(own.sum() - len(own) * own)  # of mean - own, in integers: an even load gives zero
            router.e_score_correction_bias += self.router_bias_update_speed * violation
            router.load.zero_()
        self.expert_load = load

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not self._ends_step(batch_idx):
            return
        loss = self.train_loss.compute()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/perplexity", loss.exp())
        self.log("train/accuracy", self.train_accuracy.compute())
        if self.mtp_loss_weight > 0:
            self.log("train/mtp_loss", self.train_mtp_loss.compute())
        if self.aux_loss_alpha > 0:
            self.log("train/balance_loss", self.train_balance.compute())
        for metric in (self.train_loss, self.train_accuracy, self.train_mtp_loss, self.train_balance):
            metric.reset()
        gradient_norm = self._strategy.gradient_norm
        if gradient_norm is not None:
            self.log("train/grad_norm", gradient_norm)

    @override
    def on_validation_epoch_end(self) -> None:
        for name, value in self.validation.compute().items():
            self.log(name, value, prog_bar=name == "val/loss", sync_dist=True)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The only hook that sees a checkpoint before the trainer's loops do.
        restore_progress = getattr(self.trainer.datamodule, "restore_progress", None)  # type: ignore[attr-defined]
        if restore_progress is not None:
            restore_progress(checkpoint)
