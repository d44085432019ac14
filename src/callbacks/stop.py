"""A run that is asked to stop, or is about to run out of time, saves its step and ends, to be continued later."""

import json
import logging
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import psutil  # type: ignore[import-untyped]
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from src.errors import UserError

from .step_checkpoint import StepCheckpoint

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
WORTHWHILE = 3  # steps of a session: with fewer, loading and saving take the time, start after start
MARGIN = 60.0  # seconds of the measured lead for all that is neither step nor save: other ranks, the processes' end


class Stop(pl.Callback):
    """Stops `fit` between two optimizer steps: on SIGUSR1, SIGTERM or Ctrl-C to any rank, or ahead of the end of its
    time. A second Ctrl-C stops at once, without a save.

    The step's ordinary checkpoint is saved, once, and is complete when the processes exit, with status 0; the marker
    tells such an end from that of a finished training. Validation is cut short; the export at the end is left to the
    session that comes to it. The handlers set a flag alone: what a save needs of the other ranks, it gets only where
    all of them stand, at a step's end, where they agree by one all-reduce of four bytes.

    The time ends with the Slurm job, where its end is known (SLURM_JOB_END_TIME, seconds since 1970), or after
    `time_limit`, whichever is first.

    Args:
        lead: seconds before the end for one step and one save, until the run has measured its own: then its longest
            step, validation included, plus twice its longest save, since one may be under way. At most a quarter of the
            time left when training starts.
        time_limit: days:hours:minutes:seconds of this process, e.g. 00:23:30:00.
        marker: file to write, with the step and the reason, if a stopped run should be continued.

    Raises:
        ValueError: a value is out of its range.
        SystemExit: 0 where it is to be continued; 1 where no step was trained, or fewer than `WORTHWHILE` before the
            time ended, which would only repeat itself.
    """

    def __init__(self, lead: float = 1800.0, time_limit: str | None = None, marker: str | None = None) -> None:
        if lead <= 0:
            raise UserError(f"stop.lead is {lead}; it must be positive: the seconds of one step and one save.")
        self.lead = lead
        self.time_limit = None if time_limit is None else _duration(time_limit)
        self.marker = None if marker is None else Path(marker).absolute()
        self._signal: str | None = None
        self._speaks = False
        self._handlers: dict[int, Any] = {}
        self._first_step = self._step = 0
        self._boundary: float | None = None  # when the last step began
        self._steps: list[float] = []  # seconds of the first step, then of the longest of the later ones
        self._finished = False

    # -- signals --------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            # Lightning's own requeue saves, collectives and all, inside its signal handler, and to another path.
            environment.auto_requeue = False
        self._speaks = trainer.is_global_zero
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in SIGNALS:  # again: Lightning's handler of SIGTERM, registered since, broadcasts
            signal.signal(number, self._note)
        self._first_step, self._step = trainer.global_step, -1
        self._fit_lead(is_rank_zero=trainer.is_global_zero)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        again, self._signal = name == self._signal == "Ctrl-C", name
        if name == "Ctrl-C" and self._speaks:  # past the logging, which may be what was interrupted
            happens = b"stopping at once" if again else b"this step is trained and saved first; again to stop at once"
            os.write(2, b"\nCtrl-C: " + happens + b"\n")
        if again:
            raise KeyboardInterrupt

    # -- where a run can stop -------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # in the middle of accumulation
            return
        self._step = trainer.global_step
        now = time.monotonic()
        if self._boundary is not None:
            self._time_step(now - self._boundary)
        self._boundary = now
        self._stop_if_asked(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.on_validation_start(trainer, pl_module)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        # Not `next`: Lightning takes a StopIteration for the end of the data.
        (checkpoint,) = (c for c in trainer.checkpoint_callbacks if isinstance(c, StepCheckpoint))
        why = self._why(checkpoint, is_rank_zero=trainer.is_global_zero)
        is_late = why is not None and self._signal is None
        if self._finished or not trainer.strategy.reduce_boolean_decision(why is not None, all=False):
            return
        why, step = why or "signal to another rank", trainer.global_step
        if step == self._first_step:
            if trainer.is_global_zero:
                log.error("%s: stopped before the first step was trained; there is nothing to save", why)
            raise SystemExit(1)
        checkpoint.save_and_wait(trainer)
        out_of_time = trainer.strategy.reduce_boolean_decision(is_late, all=False)
        if step >= trainer.estimated_stepping_batches:
            self._finished = True  # and saved: what is left is validation and export
            return
        if out_of_time and step - self._first_step < WORTHWHILE:
            if trainer.is_global_zero:
                log.error(
                    "%s: only %d steps fit into the time and are saved; the job is not requeued. Give more time "
                    "(sbatch --time), then --ckpt_path last",
                    *(why, step - self._first_step),
                )
            raise SystemExit(1)
        if trainer.is_global_zero:
            log.info("%s: stopped after step %d, which is saved; continue with --ckpt_path last", why, step)
            self._mark(step, why)
        raise SystemExit(0)  # past `on_train_end`, where finished runs export

    def _mark(self, step: int, why: str) -> None:
        if self.marker is None:
            return
        try:
            self.marker.parent.mkdir(parents=True, exist_ok=True)
            self.marker.write_text(json.dumps({"step": step, "why": why}) + "\n")
        except OSError as error:  # the step is saved, which the exit status is to say
            log.error("stop.marker %s was not written: %s; nothing continues the run by itself", self.marker, error)

    # -- time -----------------------------------------------------------------------------------------------------

    def _why(self, checkpoint: StepCheckpoint, is_rank_zero: bool) -> str | None:
        if self._signal is not None:
            return self._signal
        end = self._end()
        if not is_rank_zero or end is None or not self._steps:  # one step is trained in any case
            return None
        left, lead = end - time.time(), self.needed(checkpoint)
        return None if left >= lead else f"{left:.0f} s before the end of its time, {lead:.0f} s are needed"

    def _fit_lead(self, *, is_rank_zero: bool) -> None:
        """Lowers a lead that the time has no room for: it would stop the run after its first step."""
        end = self._end()
        if end is None:
            return
        left = max(0.0, end - time.time())
        if self.lead > left / 4:
            if is_rank_zero:
                log.warning(
                    "stop.lead %.0f s is more than a quarter of the remaining %.0f s: %.0f s until it is measured",
                    *(self.lead, left, left / 4),
                )
            self.lead = left / 4

    def needed(self, checkpoint: StepCheckpoint) -> float:
        """Seconds for one more step and a save."""
        if not self._steps or checkpoint.save_seconds is None:
            return self.lead
        return self._steps[-1] + 2 * checkpoint.save_seconds + MARGIN

    def _time_step(self, seconds: float) -> None:
        # The first compiles and fills caches; it is no measure once there is another.
        self._steps = [*self._steps[:1], max(self._steps[1:] + [seconds])] if self._steps else [seconds]

    def _end(self) -> float | None:
        """Seconds since 1970; None where no end is known."""
        ends = []
        if job_end := os.environ.get("SLURM_JOB_END_TIME"):
            ends.append(float(job_end))
        if self.time_limit is not None:
            ends.append(psutil.Process().create_time() + self.time_limit)
        return min(ends, default=None)


def _duration(text: str) -> float:
    """Seconds of days:hours:minutes:seconds, as the Trainer's max_time has them."""
    parts = text.split(":")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        raise UserError(f"stop.time_limit is {text!r}; it must be days:hours:minutes:seconds, e.g. 00:23:30:00.")
    days, hours, minutes, seconds = map(int, parts)
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
