"""Where a step's time goes, and what a rank is doing now.

Lightning tells its profiler when data, forward, backward, optimizer step and checkpoint begin and end. `Phases` is a
profiler around the Trainer's own that listens to these.
"""

import functools
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler
from typing_extensions import override

OTHER = "other"
# By the last part of what Lightning calls an action, e.g. [Strategy]DeepSpeedSPStrategy.backward.
_PHASES = {
    "train_dataloader_next": "data",
    "training_step": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
    "save_checkpoint": "checkpoint",
    "validation": "validation",
    "samples": "samples",
}
PHASES = (*_PHASES.values(), OTHER)
TRAINING = ("data", "forward", "backward", "optimizer", OTHER)  # the phases that make up a step


@functools.cache
def _phase(action: str) -> str | None:
    return _PHASES.get(action.rpartition(".")[2])


class Phases(Profiler):
    """The phase that this rank is in, one of `PHASES`; an inner one interrupts the outer.

    On CUDA a phase lasts from event to event of the current stream, without a device sync before `take`: `forward` is
    device time, and `data` the time that the device waited for a batch.

    Args:
        inner: the Trainer's profiler, which gets every call too.

    Attributes:
        phase: the current one. changes: how often it has changed. changed_at: when it did last, of time.monotonic().
    """

    def __init__(self, inner: Profiler, cuda: bool) -> None:
        super().__init__()
        self._inner, self._cuda = inner, cuda
        self._stack: list[str] = []
        self._marks: list[tuple[str, Any]] = []  # each phase's begin since the last `take`; none before the first
        self.phase, self.changes, self.changed_at = OTHER, 0, time.monotonic()

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "Phases":
        """The Trainer's `Phases`, wrapped around its profiler on first use."""
        profiler = trainer.profiler  # type: ignore[attr-defined]  # set by the Trainer's constructor
        if not isinstance(profiler, cls):
            profiler = cls(profiler, trainer.strategy.root_device.type == "cuda")
            trainer.profiler = profiler  # type: ignore[attr-defined]
        return profiler

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; synchronises the device."""
        last = self._now()
        if self._cuda:
            last.synchronize()
        ends = [*(begin for _, begin in self._marks[1:]), last]
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), end in zip(self._marks, ends, strict=True) if self._marks else ():
            seconds[phase] += begin.elapsed_time(end) / 1000 if self._cuda else end - begin
        self._marks = [(self.phase, last)]
        return seconds

    def failed_in(self, exception: BaseException) -> str:
        """The phase in which the exception was raised."""
        return getattr(exception, "phase", self.phase)

    @override
    def start(self, action_name: str) -> None:
        self._inner.start(action_name)
        if (phase := _phase(action_name)) is not None:
            self._stack.append(phase)
            self._enter(phase)

    @override
    def stop(self, action_name: str) -> None:
        if _phase(action_name) is not None and self._stack:
            self._stack.pop()
            self._enter(self._stack[-1] if self._stack else OTHER)
        self._inner.stop(action_name)

    @contextmanager
    @override
    def profile(self, action_name: str) -> Generator[str, None, None]:
        self.start(action_name)
        try:
            yield action_name
        except BaseException as exception:
            if not hasattr(exception, "phase"):  # the innermost action's, whose phase it is
                exception.phase = self.phase  # type: ignore[attr-defined]
            raise
        finally:
            self.stop(action_name)

    def _enter(self, phase: str) -> None:
        self.changed_at = time.monotonic()
        if phase == self.phase:
            return
        self.phase = phase
        self.changes += 1
        if self._marks:
            self._marks.append((phase, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    # -- the inner profiler's own ---------------------------------------------------------------------------------

    @override
    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        self._inner._lightning_module = getattr(self, "_lightning_module", None)  # type: ignore[attr-defined]
        self._inner.setup(stage, local_rank, log_dir)

    @override
    def summary(self) -> str:
        return self._inner.summary()

    @override
    def describe(self) -> None:
        self._inner.describe()

    @override
    def teardown(self, stage: str | None) -> None:
        self._inner.teardown(stage)
