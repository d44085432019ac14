"""How far a run is: a bar in a terminal; anywhere else, such as a Slurm log, a plain line every so many steps."""

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from typing_extensions import override

BAR = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}<{remaining}{postfix}"


def figures(metrics: Mapping[str, Any]) -> list[str]:
    """What a line shows of a step's metrics: loss, tokens/s of the whole job, MFU, memory."""
    formats = {
        "train/loss": lambda x: f"loss {x:.4f}",
        "train/tokens_per_second": lambda x: f"{x:,.0f} tokens/s",
        "train/mfu": lambda x: f"MFU {x:.1%}",
        "memory/peak_gib": lambda x: f"{x:.1f} GiB",
    }
    return [as_text(float(metrics[name])) for name, as_text in formats.items() if name in metrics]


class Progress(ProgressBar):
    """Shows on rank 0's stderr the optimizer step, the total, `figures`, the time elapsed and the time left.

    If stderr is not a terminal, prints a line every `trainer.log_every_n_steps` steps and one per validation. The time
    left assumes this session's mean step, validation and checkpoints included.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Any = None
        self._validation_bar: Any = None
        self._first = self._step = 0
        self._started = 0.0

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        if self._enabled:
            tqdm.write(sep.join(map(str, args)), file=sys.stderr)

    @property
    def _in_terminal(self) -> bool:
        return self._enabled and sys.stderr.isatty()

    # -- training -------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = self._step = trainer.global_step
        self._started = time.monotonic()
        if self._in_terminal:
            self._bar = tqdm(
                total=int(trainer.estimated_stepping_batches),
                initial=self._first,
                desc="step",
                bar_format=BAR,
                dynamic_ncols=True,
            )

    # A step's loss is logged after the callbacks' own batch end: these hooks are the first to see it.
    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._show(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(trainer)
        self._close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()  # or the error would share the bar's line

    def _close(self) -> None:
        for bar in (self._validation_bar, self._bar):
            if bar is not None:
                bar.close()
        self._bar = self._validation_bar = None

    def _show(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step == self._step or not self._enabled:
            return
        self._step = step
        shown = figures(trainer.callback_metrics)
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(shown), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            total = int(trainer.estimated_stepping_batches)
            seconds = (time.monotonic() - self._started) / (step - self._first) * (total - step)
            self.print("  ".join([f"step {step}/{total}", *shown, f"left {timedelta(seconds=round(seconds))}"]))

    # -- validation -----------------------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._show(trainer)
        if self._in_terminal:
            total = sum(map(int, trainer.num_val_batches))
            self._validation_bar = tqdm(
                total=total, desc="validation", bar_format=BAR, dynamic_ncols=True, position=1, leave=False
            )

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._validation_bar is not None:
            self._validation_bar.update()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._validation_bar is not None:
            self._validation_bar.close()
            self._validation_bar = None
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            logged = trainer.callback_metrics.items()
            losses = [f"{name} {value:.4f}" for name, value in logged if name.startswith("val/") and "loss" in name]
            self.print("  ".join([f"step {trainer.global_step}", *losses]))
