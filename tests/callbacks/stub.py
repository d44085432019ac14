"""A module of one weight that is trained on what callbacks read of real batches."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch

from src.callbacks.loggers import count_steps_from_one

ACCUMULATION = 2
STEPS = 4
LENGTHS: tuple[list[int], ...] = ([3, 5], [7], [4, 4, 2], [])  # of the documents of each micro-batch, in turn


def batches() -> list[dict[str, Any]]:
    """Two micro-batches a step; each row ends with a document of padding, which has no source."""
    found = []
    for number in range(STEPS * ACCUMULATION):
        lengths = LENGTHS[number % len(LENGTHS)]
        step = [*LENGTHS[number // 2 * 2 % len(LENGTHS)], *LENGTHS[(number // 2 * 2 + 1) % len(LENGTHS)]]
        cu_seqlens = torch.tensor([0, *lengths, 6]).cumsum(0).int()
        found.append(
            {
                "cu_seqlens": cu_seqlens,
                "sources": ["memory:1"] * len(lengths),
                "step_tokens": sum(step),
                "step_targets": 11,
                "step_mtp_targets": 9,
            }
        )
    return found


class Stub(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.counted: list[tuple[int, ...]] = []  # what MFU was asked for
        self.model: Any = SimpleNamespace(step_flops=self.step_flops)

    def step_flops(self, *counts: int) -> int:
        self.counted.append(counts)
        return 10**9

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.linear(torch.ones(1, device=self.device)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 0.5)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("train/loss", float(self.trainer.global_step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    validate: bool = False,
    ckpt_path: str | None = None,
    **settings: Any,
) -> pl.Trainer:
    has_bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    defaults: dict[str, Any] = {"accelerator": "cpu", "logger": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATION,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=has_bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **(defaults | settings),
    )
    count_steps_from_one(trainer)
    loader: Any = torch.utils.data.DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader if validate else None, ckpt_path=ckpt_path)
    return trainer
