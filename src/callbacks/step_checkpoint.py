"""Checkpoints by optimizer step, the newest ones kept, `last.ckpt` a relative link to the newest."""

import re
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from src.callbacks.folders import checkpoint_folder
from src.checkpoints.saving import SaveFailed
from src.disk.durable import point, remove, remove_leftovers
from src.errors import UserError

LAST = "last.ckpt"


def step_of(path: Path, suffix: str = ".ckpt") -> int:
    """The optimizer step of `step=N` and the suffix, -1 for any other name."""
    match = re.fullmatch(rf"step=([0-9]+){re.escape(suffix)}", path.name)
    return int(match[1]) if match else -1


def superseded(written: Path, keep: int, suffix: str = ".ckpt") -> list[Path]:
    """Which saves next to the one just written, which stays whatever its step is, are more than `keep` with it."""
    steps = {path: step_of(path, suffix) for path in written.parent.iterdir() if path != written}
    others = sorted((path for path, step in steps.items() if step >= 0), key=lambda path: steps[path])
    return others[: max(0, len(others) + 1 - keep)]


class StepCheckpoint(Checkpoint):
    """Saves `<default_root_dir>/checkpoints/step=N.ckpt` every `every_n_train_steps` and at the end of training.

    A save that fails is logged, and training goes on; `fit` ends with the error if the last one failed.

    Args:
        every_n_train_steps: optimizer steps between checkpoints; 0 saves at the end only.
        keep: how many of the newest checkpoints to keep; older ones are removed once a newer one is complete.
        async_save: write in parallel with training, which waits only for a copy in host memory; from the first save on
            that copy takes as much memory per process as its files take on the disk.

    Raises:
        SaveFailed: the checkpoint of the last step could not be saved.
    """

    def __init__(self, every_n_train_steps: int = 100, keep: int = 2, async_save: bool = True) -> None:
        super().__init__()
        if every_n_train_steps < 0:
            raise UserError(f"every_n_train_steps is {every_n_train_steps}; it must be 0 (at the end only) or more.")
        if keep < 1:
            raise UserError(f"keep is {keep}; at least the newest checkpoint is kept.")
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self.async_save = async_save
        self._saved_step = 0
        self.save_seconds: float | None = None  # on rank 0: the longest save so far, from its begin to its last byte

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step  # a resumed run stands where its checkpoint does
        if trainer.is_global_zero:
            remove_leftovers(checkpoint_folder(trainer.default_root_dir))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0:
            with suppress(SaveFailed):  # rank 0 has logged it, and the next save tries again
                self._save(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_and_wait(trainer)

    def save_and_wait(self, trainer: pl.Trainer) -> None:
        """Returns when the checkpoint of this step is complete; to be called by all ranks."""
        self._save(trainer)
        trainer.strategy.wait_for_checkpoint()  # type: ignore[attr-defined]

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        # Nothing trained since, or in the middle of accumulation; or a try, after which the run is to begin.
        if step == self._saved_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saved_step = step
        began = time.monotonic()  # an earlier save may still be on its way: each has its own
        trainer.save_checkpoint(
            checkpoint_folder(trainer.default_root_dir) / f"step={step}.ckpt",
            storage_options={"asynchronous": self.async_save, "then": partial(self._make_last, began)},
        )

    def _make_last(self, began: float, checkpoint: Path) -> None:
        """On rank 0, once a checkpoint is complete; in this order, so that `last.ckpt` always leads to a whole one."""
        self.save_seconds = max(self.save_seconds or 0.0, time.monotonic() - began)
        folder = checkpoint.parent
        point(folder / LAST, checkpoint.name)
        remove(superseded(checkpoint, self.keep))
        remove_leftovers(folder)
