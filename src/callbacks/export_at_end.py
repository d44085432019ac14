"""The trained weights as a Hugging Face directory, written by the running job itself when training ends."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

import lightning.pytorch as pl
from typing_extensions import override

from src.checkpoints.export_folder import check_target
from src.weights.output import Dtype

from .run_record import run_record


class ExportingStrategy(Protocol):
    """What this callback asks of the strategy; src.strategies.DeepSpeedSPStrategy has it."""

    def export(
        self, run_files: dict[str, Any], out: Path, dtype: Dtype, max_shard_size: str, measure: bool = True
    ) -> None: ...


class ExportAtEnd(pl.Callback):
    """Exports from the ranks' own partitions, all ranks writing at once; no checkpoint is read.

    The files are those of `python -m src.cli export` from a checkpoint of the last step.

    Args:
        out: directory to create when the export is complete; it must not exist. None: no export.
        dtype: bf16; fp8, in DeepSeek's 128 x 128 blocks; or fp32, the masters unchanged.
        max_shard_size: largest file of weights. There should be at least as many files as ranks.

    Raises:
        ValueError: before training, `out` is there already or max_shard_size is no size.
    """

    def __init__(
        self,
        out: str | None = None,
        dtype: Dtype = "bf16",
        max_shard_size: str = "5GB",
    ) -> None:
        self.out = Path(out).absolute() if out else None
        self.dtype, self.max_shard_size = dtype, max_shard_size

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.out is not None and stage == "fit":
            with getattr(trainer.strategy, "fail_together", nullcontext)():  # each node has its own view of `out`
                check_target(self.out, self.max_shard_size)
            run_record(trainer, self)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.out is not None:
            run_files = run_record(trainer, self).side_files(trainer)
            cast(ExportingStrategy, trainer.strategy).export(run_files, self.out, self.dtype, self.max_shard_size)
