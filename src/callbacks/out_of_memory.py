"""An out-of-memory error that says what would help."""

import shlex
import sys
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import psutil  # type: ignore[import-untyped]
import torch
from typing_extensions import override

from src.callbacks.phase_timer import Phases
from src.units import GIB

STRATEGY = "--trainer.strategy.init_args."


@dataclass(frozen=True)
class Setting:
    """A setting that memory depends on: its value now, and one that needs less."""

    option: str
    now: Any
    less: Any
    cost: str


def remedies(trainer: pl.Trainer, pl_module: Any) -> list[Setting]:
    """The settings of this run that would lower GPU memory, cheapest first."""
    strategy, data = trainer.strategy, getattr(trainer, "datamodule", None)
    changes = []
    if not getattr(pl_module, "activation_checkpointing", True):
        changes.append(Setting("--model.activation_checkpointing", "false", "true", "a third more computation"))
    kept = getattr(getattr(pl_module, "model", None), "kept_bytes", {})  # of src.models.deepseek_v3's
    for name in ("layer_input", "attention_output"):
        if getattr(pl_module, name, None) == "keep":
            size = f"{kept[name] / 1024:.0f} KiB per token and layer " if name in kept else ""
            changes.append(Setting(f"--model.{name}", "keep", "offload", f"{size}to host memory"))
    if not getattr(strategy, "offloads_optimizer", True):
        changes.append(
            Setting(f"{STRATEGY}offload_optimizer", "false", "true", "states to host memory, a slower optimizer step")
        )
    sp = getattr(strategy, "sequence_parallel_size", 0)
    heads = getattr(getattr(pl_module, "config", None), "num_attention_heads", 0)
    larger = [n for n in range(sp + 1, trainer.world_size + 1) if trainer.world_size % n == 0 and heads % n == 0]
    if sp and larger:
        more = f"{larger[0] / sp:g}"
        cost = f"1/{more} of the tokens per GPU and micro-step, so {more} x accumulate_grad_batches for the same rows"
        changes.append(Setting(f"{STRATEGY}sequence_parallel_size", sp, larger[0], cost))
    batch_size = getattr(data, "batch_size", 1)
    if batch_size > 1:
        cost = "half the tokens for the same exchange of weights"
        changes.append(Setting("--data.batch_size", batch_size, batch_size // 2, cost))
    shard = _experts_per_shard(pl_module)
    if shard > 1:
        smaller = max(n for n in range(1, shard) if shard % n == 0)
        changes.append(Setting("--model.experts_per_shard", shard, smaller, "smaller products and exchanges"))
    if getattr(strategy, "reduce_dtype", "fp32") == "bf16":
        cost = "less memory for NCCL and a node's sums, twice the bytes of experts' gradients"
        changes.append(Setting(f"{STRATEGY}reduce_dtype", "bf16", "fp32", cost))
    ep = getattr(strategy, "expert_parallel_size", 1)
    if ep > 1:
        node = trainer.num_devices
        smaller = max(n for n in range(1, ep) if ep % n == 0 and (node % n == 0 or n % node == 0))
        cost = "fewer tokens received where routing is uneven, but more experts gathered"
        changes.append(Setting(f"{STRATEGY}expert_parallel_size", ep, smaller, cost))
    return changes


def _experts_per_shard(pl_module: Any) -> int:
    return max(
        (m.experts_per_shard for name, m in pl_module.named_modules() if name.endswith("mlp.experts")), default=0
    )


def memory_figures() -> str:
    """Memory of this process's GPU, if any, and of its host."""
    figures = []
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        figures = [
            f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB allocated at most in this step",
            f"{torch.cuda.max_memory_reserved() / GIB:.1f} GiB reserved by PyTorch",
            f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB of the GPU in use",
        ]
    host = psutil.virtual_memory()
    return ", ".join([*figures, f"{host.available / GIB:.0f} of {host.total / GIB:.0f} GiB of host memory available"])


def plan_command(arguments: list[str], changes: list[Setting]) -> str:
    """The `plan` command of this run with some settings changed; `arguments` are `fit`'s."""
    words = ["plan", *arguments, *(f"{change.option}={change.less}" for change in changes)]
    return "python -m src.cli " + shlex.join(words)


class OutOfMemory(pl.Callback):
    """Adds the phase, the memory and the remedies to an out-of-memory error, on the rank that raised it.

    Args:
        arguments: of `fit`, for the advice; by default this command's own.
    """

    def __init__(self, arguments: list[str] | None = None) -> None:
        self._arguments = sys.argv[2:] if arguments is None else arguments

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        Phases.of(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, torch.OutOfMemoryError):
            return
        changes = remedies(trainer, pl_module)
        lines = [
            f"Rank {trainer.global_rank} ran out of GPU memory in step {trainer.global_step + 1}, phase "
            f"{Phases.of(trainer).failed_in(exception)}: {memory_figures()}.",
            "What would change it, the cheapest first:",
            *(f"  {change.option}={change.less}  (now {change.now}): {change.cost}" for change in changes),
            "  a lower --data.max_length, or more nodes",
            "The first of them as a plan, without a GPU:",
            f"  {plan_command(self._arguments, changes[:1])}",
        ]
        exception.add_note("\n".join(lines))
