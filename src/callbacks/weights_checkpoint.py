"""The weights alone, between checkpoints: Hugging Face directories that transformers and vLLM load as they are."""

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
import torch.distributed as dist
from typing_extensions import override

from src.checkpoints.export import OtherRankFailed
from src.disk.durable import INCOMPLETE, remove
from src.errors import UserError

from .export_at_end import ExportingStrategy
from .folders import weights_folder
from .run_record import run_record
from .step_checkpoint import superseded

log = logging.getLogger(__name__)

MAX_SHARD_SIZE = "5GB"  # 274 files for DeepSeek-V3, so that 256 ranks have one each


class WeightsCheckpoint(pl.Callback):
    """Exports `<default_root_dir>/weights/step=N` in BF16 every `every_n_train_steps`, from the ranks' own partitions.

    A directory with that name is complete. Training waits while it is written. A save that fails, on a full disk for
    example, is logged and training continues. The last step's weights are in the last checkpoint and `export.out`.

    Args:
        every_n_train_steps: optimizer steps between saves of the weights; 0: none.
        keep: how many of the newest directories to keep; older ones are removed once a newer one is complete.
    """

    def __init__(self, every_n_train_steps: int = 0, keep: int = 2) -> None:
        if every_n_train_steps < 0:
            raise UserError(f"weights.every_n_train_steps is {every_n_train_steps}; it must be 0 (none) or more.")
        if keep < 1:
            raise UserError(f"weights.keep is {keep}; at least the newest weights are kept.")
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self._saved_step = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.every_n_train_steps and stage == "fit":
            run_record(trainer, self)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step  # nothing is trained since
        if self.every_n_train_steps and trainer.is_global_zero:
            _remove_leftovers(weights_folder(trainer.default_root_dir))

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        step = trainer.global_step
        # The same step comes again within accumulation.
        if self.every_n_train_steps and step % self.every_n_train_steps == 0 and step != self._saved_step:
            self._saved_step = step
            self._save(trainer, weights_folder(trainer.default_root_dir).absolute() / f"step={step}")

    def _save(self, trainer: pl.Trainer, out: Path) -> None:
        # What fails on one rank alone must not leave the others in the export's collectives.
        error: str | None = None
        try:
            if trainer.is_global_zero and out.exists():  # an earlier session got further before it was killed
                remove([out])
            run_files = run_record(trainer, self).side_files(trainer)
        except Exception as own:
            error = str(own)
        errors = _of_all_ranks(trainer, error)
        if not errors:
            try:
                # Unmeasured: training waits, and `train/kept` tells it.
                cast(ExportingStrategy, trainer.strategy).export(run_files, out, "bf16", MAX_SHARD_SIZE, measure=False)
            except OtherRankFailed:
                pass
            except Exception as own:  # every rank gets one of the two, so none waits for the others
                error = str(own)
            errors = _of_all_ranks(trainer, error)
        if not trainer.is_global_zero:
            return
        if errors:
            log.error("%s was not saved; training continues, and the next save tries again: %s", out, "; ".join(errors))
        try:
            if not errors:
                remove(superseded(out, self.keep, suffix=""))
            _remove_leftovers(out.parent)
        except OSError as own:
            log.error("older weights in %s were not removed: %s", out.parent, own)


def _of_all_ranks(trainer: pl.Trainer, error: str | None) -> list[str]:
    """The ranks' distinct errors; collective."""
    errors: list[str | None] = [None] * trainer.world_size
    dist.all_gather_object(errors, error)
    return list(dict.fromkeys(text for text in errors if text is not None))


def _remove_leftovers(folder: Path) -> None:
    """Removes what interrupted saves and removals left behind."""
    with suppress(OSError):  # of one rank's alone
        for suffix in (".partial", INCOMPLETE):
            for left in folder.glob(f"step=*{suffix}"):
                shutil.rmtree(left, ignore_errors=True)
