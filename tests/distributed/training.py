"""One training run through Trainer, strategy, module and datamodule on any layout, and the same in plain PyTorch."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from lightning.pytorch.callbacks import Checkpoint
from safetensors.torch import save_file
from transformers import DeepseekV3ForCausalLM as OracleModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from src.datamodules import SFTDataModule
from src.datamodules.collate import Document, target_counts
from src.datamodules.packing import PackedRows, one_sample_a_row, pack
from src.datamodules.row_account import Statistics
from src.datamodules.sft import PackedSet
from src.models.sft_module import SFTModule
from src.strategies import DeepSpeedSPStrategy
from tests.models.tiny import hf_state_dict, oracle_losses, oracle_tensors

MAX_LENGTH = 64
VOCAB = 96
VALIDATION = 20  # documents, the first of those trained on


def documents(count: int, seed: int = 0) -> list[Document]:
    """Random conversations of 1 to 40 tokens, most with one or two target spans, in no order of length."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        length = int(generator.integers(1, 41))
        cuts = sorted(generator.integers(0, length + 1, size=4).tolist())
        ids = generator.integers(0, VOCAB, size=length).astype(np.int32)
        spans = np.array([cuts[:2], [cuts[2], max(cuts[3], cuts[2])]], dtype=np.int32)
        found.append(Document(ids, spans, f"memory:{index + 1}"))
    return found


class MemoryCache:
    """What the datamodule asks of a TokenCache, over documents in memory."""

    fingerprint = "memory"

    def __init__(self, docs: list[Document]) -> None:
        self.docs = docs
        self.lengths = np.array([len(d.input_ids) for d in docs], dtype=np.int32)
        counts = np.array([target_counts(map(tuple, d.target_spans.tolist())) for d in docs], dtype=np.int32)
        self.targets, self.mtp_targets = counts[:, 0], counts[:, 1]
        self.statistics = Statistics(rows=len(docs), samples=len(docs))

    def __len__(self) -> int:
        return len(self.docs)

    def document(self, index: int) -> Document:
        return self.docs[index]


def rows_of(cache: MemoryCache, packing: bool) -> PackedRows:
    return pack(cache.lengths, MAX_LENGTH) if packing else one_sample_a_row(len(cache))


class MemoryData(SFTDataModule):
    def __init__(self, docs: list[Document], batch_size: int, packing: bool = True, num_workers: int = 0) -> None:
        super().__init__([], max_length=MAX_LENGTH, batch_size=batch_size, packing=packing, num_workers=num_workers)
        train, val = MemoryCache(docs), MemoryCache(docs[:VALIDATION])
        self.train_set = PackedSet(train, rows_of(train, packing))  # type: ignore[arg-type]
        self.val_set = PackedSet(val, rows_of(val, packing))  # type: ignore[arg-type]

    def prepare_data(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        """Nothing: the sets are there, and of no files that could be suspicious."""


@dataclass(frozen=True)
class Layout:
    dp: int
    sp: int
    accumulation: int
    batch_size: int
    packing: bool = True
    precision: str = "32-true"
    stage: int = 3
    offload_optimizer: bool = False
    offload_parameters: bool = False
    experts_per_shard: int = 2
    ep: int = 1
    attention_output: Literal["keep", "offload", "recompute"] = "recompute"
    activation_checkpointing: bool = True
    sub_group_size: int = 1_000_000_000  # elements of a flat tensor of stage 3's optimizer
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    node: int | None = None  # of reduce_dtype bf16

    @property
    def world_size(self) -> int:
        return self.dp * self.sp


@dataclass(frozen=True)
class Recipe:
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    gradient_clip_val: float = 1.0
    aux_loss_alpha: float = 0.05
    router_bias_update_speed: float = 0.02
    mtp_loss_weight: float | None = None
    steps: int = 5
    freeze: tuple[str, ...] = ()
    weight_rounding: Literal["nearest", "stochastic"] = "stochastic"


class Record(pl.Callback):
    """Loss and gradient norm of each step, all gradients of the first step, all weights at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.sources: list[list[str]] = []
        self.rates: list[list[float]] = []
        self.draws: list[tuple[float, ...]] = []  # of each global generator, one a step
        self.first_step = 0
        self.metrics: dict[str, float] = {}  # what the last step and the validation after it logged

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        engine = trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]
        if not engine.is_gradient_accumulation_boundary():
            return
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        if trainer.global_step == 0:
            self.gradients = _by_name(pl_module, safe_get_full_grad)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self._note_step(trainer)
        self.sources.append(batch["sources"])

    def _note_step(self, trainer: pl.Trainer) -> None:
        if trainer.global_step > self.first_step + len(
            self.losses
        ):  # here, since the module logs after the callbacks' batch end
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.norms.append(float(trainer.strategy.gradient_norm or 0.0))  # type: ignore[attr-defined]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note_step(trainer)
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.weights = _by_name(pl_module, safe_get_full_fp32_param)
        for name, buffer in pl_module.model.named_buffers():  # type: ignore[union-attr]
            if name.endswith("e_score_correction_bias"):
                self.weights[name] = buffer.clone()


def _by_name(module: pl.LightningModule, get: Any) -> dict[str, torch.Tensor]:
    """Our tensors under transformers' module names, expert shards concatenated, those of other ranks too."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in module.model.named_parameters():  # type: ignore[union-attr]
        if get is safe_get_full_grad and not parameter.requires_grad:
            continue
        tensor = get(parameter)
        if tensor is None:  # stage 0 keeps them in the parameter
            tensor = parameter.grad if get is safe_get_full_grad else parameter
        tensor = tensor.detach().float().clone()
        base, stacked, rest = name.partition(".mlp.experts.")
        if stacked:
            whole = f"{base}.mlp.experts.{rest.split('.')[1]}"
            found[whole] = torch.cat([found[whole], tensor]) if whole in found else tensor
        else:
            found[name] = tensor
    shared = module.trainer.strategy.ep_group  # type: ignore[attr-defined]
    if shared is not None:
        parts: list[Any] = [None] * shared.size
        dist.all_gather_object(parts, {n: t for n, t in found.items() if ".mlp.experts." in n}, group=shared.group)
        found |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return found


def fit(
    layout: Layout,
    recipe: Recipe,
    model_directory: str,
    count: int,
    root: str | None = None,
    module_class: type[SFTModule] = SFTModule,
    more_callbacks: tuple[pl.Callback, ...] = (),
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Trains on this rank of the layout, from the beginning or a checkpoint; to be called on every rank.

    Returns the record as plain values.
    """
    record = Record()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=layout.world_size,
        precision=layout.precision,  # type: ignore[arg-type]
        strategy=DeepSpeedSPStrategy(
            sequence_parallel_size=layout.sp,
            expert_parallel_size=layout.ep,
            stage=layout.stage,
            offload_optimizer=layout.offload_optimizer,
            offload_parameters=layout.offload_parameters,
            sub_group_size=layout.sub_group_size,
            reduce_dtype=layout.reduce_dtype,
            reduce_node_size=layout.node,
        ),
        max_steps=recipe.steps,
        accumulate_grad_batches=layout.accumulation,
        gradient_clip_val=recipe.gradient_clip_val,
        logger=False,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in more_callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[record, *more_callbacks],
        default_root_dir=root,
    )
    module = module_class(
        model_directory,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_ratio=0.4,
        aux_loss_alpha=recipe.aux_loss_alpha,
        router_bias_update_speed=recipe.router_bias_update_speed,
        mtp_loss_weight=recipe.mtp_loss_weight,
        freeze=list(recipe.freeze),
        weight_rounding=recipe.weight_rounding,
        experts_per_shard=layout.experts_per_shard,
        activation_checkpointing=layout.activation_checkpointing,
        attention_output=layout.attention_output,
        layer_input="offload" if layout.attention_output == "offload" else "keep",
    )
    trainer.ckpt_path = checkpoint  # as the CLI does, so that the module knows while it builds the model
    trainer.fit(module, MemoryData(documents(count), layout.batch_size, layout.packing))
    return {
        "losses": record.losses,
        "norms": record.norms,
        "gradients": record.gradients,
        "weights": record.weights,
        "sources": record.sources,
        "rates": record.rates,
        "draws": record.draws,
        "metrics": record.metrics,
    }


def save_model(model: OracleModel, fields: dict[str, Any], directory: Path, mtp: Any = None) -> str:
    """A Hugging Face directory with published names, written without the code under test."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields | {"num_nextn_predict_layers": int(mtp is not None)}))
    state = {name: tensor.detach().contiguous().clone() for name, tensor in hf_state_dict(model, mtp).items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def balance_of_document(scores: torch.Tensor, config: Any) -> torch.Tensor:
    """DeepSeek-V3's equations 17 to 20 for one document's affinities [T, E], expert by expert."""
    top_k, total = config.num_experts_per_tok, torch.zeros(())
    among_best = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(top_k, -1).indices, True)
    for expert in range(scores.shape[1]):
        frequency = scores.shape[1] / (top_k * len(scores)) * among_best[:, expert].sum()
        total = total + frequency * (scores[:, expert] / scores.sum(-1)).mean()
    return total


@torch.no_grad()
def means(main: OracleModel, docs: list[Document], prefix: str) -> dict[str, float]:
    """Loss, perplexity and accuracy by target token of some documents, each alone in its pass."""
    total, correct, targets = 0.0, 0, 0
    for doc in docs:
        ids = torch.from_numpy(doc.input_ids.astype(np.int64))
        logits = main(ids[None]).logits[0]
        for place in sorted({i for start, stop in doc.target_spans.tolist() for i in range(start, stop)} - {0}):
            total -= float(logits[place - 1].log_softmax(-1)[ids[place]])
            correct += int(logits[place - 1].argmax() == ids[place])
            targets += 1
    loss = total / targets
    return {
        f"{prefix}/loss": loss,
        f"{prefix}/perplexity": float(np.exp(loss)),
        f"{prefix}/accuracy": correct / targets,
    }


def plain_pytorch(
    main: OracleModel, mtp: Any, recipe: Recipe, count: int, rows_per_step: int, packing: bool = True
) -> dict[str, Any]:
    """The same run with transformers' models, one document at a time, torch's AdamW, no packing, no engine."""
    cache = MemoryCache(documents(count))
    rows = rows_of(cache, packing)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    tensors = {n: t for n, t in oracle_tensors(main, mtp).items() if "inv_freq" not in n}
    trained = {n: t for n, t in tensors.items() if t.requires_grad}
    decayed = [p for name, p in trained.items() if not name.endswith((".bias", "norm.weight"))]
    undecayed = [p for name, p in trained.items() if name.endswith((".bias", "norm.weight"))]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    warmup = int(np.ceil(0.4 * recipe.steps))
    result: dict[str, Any] = {"losses": [], "norms": []}

    models = [main] if mtp is None else [main, *mtp.layers]
    routers = [module for model in models for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
    routed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of the last forward, a router: logits, chosen experts

    def note(router: torch.nn.Module, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        routed[id(router)] = output[0], output[2]

    for router in routers:
        router.register_forward_hook(note)
    for step in range(recipe.steps):
        docs = [cache.docs[s] for r in order[step * rows_per_step : (step + 1) * rows_per_step] for s in rows[r]]
        total, mtp_total, balance, targets, mtp_targets = (torch.zeros(()) for _ in range(5))
        load = torch.zeros(len(routers), main.config.n_routed_experts)
        for doc in docs:
            wanted = torch.zeros(len(doc.input_ids), dtype=torch.bool)
            for start, stop in doc.target_spans.tolist():
                wanted[start:stop] = True
            ids = torch.from_numpy(doc.input_ids.astype(np.int64))
            loss, mtp_loss = oracle_losses(main, mtp, [(ids, wanted)])
            total, mtp_total = total + loss, mtp_total + mtp_loss
            targets, mtp_targets = targets + wanted[1:].sum(), mtp_targets + wanted[2:].sum()
            for index, router in enumerate(routers):
                router_logits, chosen = routed[id(router)]
                balance = balance + len(ids) * balance_of_document(router_logits.sigmoid(), main.config)
                load[index] += torch.bincount(chosen.flatten(), minlength=load.shape[1])
        tokens = sum(len(doc.input_ids) for doc in docs)
        objective = total / targets + recipe.aux_loss_alpha * balance / tokens
        if mtp is not None:
            assert recipe.mtp_loss_weight is not None
            objective = objective + recipe.mtp_loss_weight * mtp_total / mtp_targets
        optimizer.zero_grad()
        objective.backward()
        if step == 0:
            result["gradients"] = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
        result["losses"].append((total / targets).item())
        limit = recipe.gradient_clip_val or float("inf")
        result["norms"].append(float(torch.nn.utils.clip_grad_norm_(trained.values(), limit)))
        progress = max(0, step - warmup) / max(1, recipe.steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + np.cos(np.pi * min(1.0, progress)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * factor
        result["metrics"] = means(main, docs, "train")  # before the step, as they are logged
        optimizer.step()
        for router, counts in zip(routers, load, strict=True):
            router.e_score_correction_bias += recipe.router_bias_update_speed * torch.sign(counts.mean() - counts)
    result["metrics"] |= means(main, cache.docs[:VALIDATION], "val")
    result["weights"] = {n: t.detach().clone() for n, t in tensors.items()}
    return result
