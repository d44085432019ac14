"""Checkpoints by optimizer step, the newest ones kept, `last.ckpt` a relative link to the newest."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

FOLDER = "checkpoints"
LAST = "last.ckpt"


def checkpoint_folder(root: str | Path) -> Path:
    return Path(root) / FOLDER


def step_of(path: Path) -> int:
    """The optimizer step of `step=N.ckpt`, -1 for any other name."""
    name = path.name
    digits = name.removeprefix("step=").removesuffix(".ckpt")
    return int(digits) if name == f"step={digits}.ckpt" and digits.isdigit() else -1


class StepCheckpoint(Checkpoint):
    """Saves `<default_root_dir>/checkpoints/step=N.ckpt` every `every_n_train_steps` and at the end of training.

    Args:
        every_n_train_steps: optimizer steps between checkpoints; 0 saves at the end only.
        keep: newest checkpoints kept; older ones are removed once a newer one is complete.
    """

    def __init__(self, every_n_train_steps: int = 100, keep: int = 2) -> None:
        super().__init__()
        if every_n_train_steps < 0:
            raise ValueError(f"every_n_train_steps is {every_n_train_steps}; it must be 0 (at the end only) or more.")
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least the newest checkpoint is kept.")
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self._saved_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step  # a resumed run stands where its checkpoint does

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step == self._saved_step:  # nothing trained since, or in the middle of accumulation
            return
        folder = checkpoint_folder(trainer.default_root_dir)
        trainer.save_checkpoint(folder / f"step={step}.ckpt")
        self._saved_step = step
        if trainer.is_global_zero:
            self._point_last_at(folder, f"step={step}.ckpt")
            for old in sorted(folder.glob("step=*.ckpt"), key=step_of)[: -self.keep]:
                shutil.rmtree(old)
        trainer.strategy.barrier()

    @staticmethod
    def _point_last_at(folder: Path, name: str) -> None:
        aside = folder / f"{LAST}.new"
        aside.unlink(missing_ok=True)
        aside.symlink_to(name)
        os.replace(aside, folder / LAST)
