"""Detects a hang: names the rank that the others wait for, writes every rank's stacks, and ends the job."""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from src.callbacks.phase_timer import Phases
from src.errors import UserError
from src.units import counted

log = logging.getLogger(__name__)

FOLDER = "stacks"
PATIENCE = 4  # times as long for the first step and for the phases that may well be slow
SLOW_PHASES = ("checkpoint", "validation", "samples")
MARGIN = 5.0  # minutes between the longest wait here and the failure of a collective
EXIT_STATUS = 1
COLLECTIVES = f"torch{os.sep}distributed{os.sep}"

Report = dict[str, Any]


class Watchdog(pl.Callback):
    """A thread on each rank of `fit` that checks a few times per minute when its rank's phase last changed.

    If that is too long ago, every rank writes its position and the stacks of all its threads to
    `<default_root_dir>/stacks/rank-N.txt`. The lowest of these ranks names the rank that the others wait for, in
    `report.txt` next to them and in its log. Then all processes exit with status 1, so that the job ends and can
    restart. The folder of an earlier hang is renamed and kept.

    A process that cannot even run this thread has its stacks written to stderr and is ended by faulthandler.

    Args:
        minutes: time without a change of phase that counts as a hang; four times as long in the first step,
            checkpoints, validation and samples. 0 turns the watchdog off.
        exit: end the processes; false only reports, once.

    Raises:
        ValueError: minutes is negative.
    """

    def __init__(self, minutes: float = 15.0, exit: bool = True) -> None:
        if minutes < 0:
            raise UserError(f"watchdog.minutes is {minutes}; it must be 0 (off) or more.")
        self.minutes, self.exit = minutes, exit
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def collective_minutes(self) -> float:
        """Minutes that collectives must wait at least, so that the watchdog finds the reason before they fail."""
        return self.minutes * PATIENCE + MARGIN

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        Phases.of(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.minutes:
            return
        self._folder = Path(trainer.default_root_dir) / FOLDER
        if trainer.is_global_zero and self._folder.exists():
            self._folder.rename(f"{self._folder}-until-{time.strftime('%Y-%m-%dT%H-%M-%S')}")
        self._trainer, self._phases, self._first_step = trainer, Phases.of(trainer), trainer.global_step
        self._main = threading.get_ident()
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    # The last checkpoint and an export follow; they are not timed.
    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # -- the thread -----------------------------------------------------------------------------------------------

    @property
    def _interval(self) -> float:
        return min(10.0, self.minutes * 60 / 10)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            # Past the interpreter's lock, which a main thread that hangs may hold; put off as long as this loop runs.
            faulthandler.dump_traceback_later(self.minutes * 60 * PATIENCE, file=2, exit=self.exit)
            if self._hangs():
                self._report()
                break
        faulthandler.cancel_dump_traceback_later()

    def _hangs(self) -> bool:
        still = time.monotonic() - self._phases.changed_at
        patient = self._phases.phase in SLOW_PHASES or self._trainer.global_step == self._first_step
        limit = self.minutes * 60
        # The folder is another rank's alarm; a rank that makes progress does not look for it.
        return still > limit * (PATIENCE if patient else 1) or (still > limit / 2 and self._folder.exists())

    def _report(self) -> None:
        trainer, rank = self._trainer, self._trainer.global_rank
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._folder / f".rank-{rank}"
        with open(aside, "w") as file:
            file.write(json.dumps(self._state()) + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        aside.rename(self._folder / f"rank-{rank}.txt")

        # Ranks detect it at different times: they poll, and they began to wait, at different times.
        deadline = time.monotonic() + 2 * self._interval + min(30.0, self.minutes * 60)
        while len(reports := self._reports()) < trainer.world_size and time.monotonic() < deadline:
            time.sleep(self._interval / 10)
        report = self._folder / "report.txt"
        if rank == min(reports):
            text = describe(reports, trainer.world_size)
            log.error("%s\nThe stacks are in %s.", text, self._folder)
            report.write_text(text + "\n")
        deadline = time.monotonic() + 2 * self._interval
        while not report.exists() and time.monotonic() < deadline:  # the job must not end before it is written
            time.sleep(self._interval / 10)
        if self.exit:
            sys.stderr.flush()
            os._exit(EXIT_STATUS)

    def _state(self) -> Report:
        trainer, phases = self._trainer, self._phases
        accumulation = trainer.accumulate_grad_batches
        completed = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        still = time.monotonic() - phases.changed_at
        return {
            "rank": trainer.global_rank,
            "host": socket.gethostname(),
            "step": trainer.global_step + 1,
            "micro_step": completed % accumulation + 1,
            "of": accumulation,
            "phase": phases.phase,
            "changes": phases.changes,
            "since": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - still)),
            "seconds": round(still),
            "at": self._place(),
        }

    def _place(self) -> str:
        """The innermost line of the main thread, and of threads that Python did not start: autograd's on CUDA."""
        started = {thread.ident for thread in threading.enumerate()} - {self._main}
        frames = [frame for ident, frame in sys._current_frames().items() if ident not in started]
        places = (f"{f.f_code.co_filename}:{f.f_lineno} in {f.f_code.co_name}" for f in frames)
        return " and ".join(sorted(places))

    def _reports(self) -> Mapping[int, Report]:
        reports = {}
        for path in self._folder.glob("rank-*.txt"):
            with open(path) as file:
                state = json.loads(file.readline())
            reports[state["rank"]] = state
        return reports


def describe(reports: Mapping[int, Report], world_size: int) -> str:
    """Says which ranks differ from the others, and where they are; `reports` by rank.

    All ranks go through the same phases, so a rank with fewer changes is behind. If all count the same, the slow ranks
    are those in no collective, or at another line than most.
    """
    some = next(iter(reports.values()))
    lines = [
        f"No progress for {some['seconds']} s: the run hangs. {len(reports)} of {counted(world_size, 'rank')} reported."
    ]
    if missing := sorted(set(range(world_size)) - set(reports)):
        lines.append(f"Nothing from {_ranks(missing)}: gone, unable to run Python, or still at work. Look there first.")
    most = max(report["changes"] for report in reports.values())
    apart = [rank for rank, report in reports.items() if report["changes"] < most]
    if not apart:
        apart = [rank for rank, report in reports.items() if COLLECTIVES not in report["at"]]
    if len(apart) == len(reports):
        ((usual, _), *_) = Counter(report["at"] for report in reports.values()).most_common()
        apart = [rank for rank, report in reports.items() if report["at"] != usual]
    behind = "The slow rank is behind the others" if len(apart) == 1 else "Behind the others"
    lines += [f"{behind}: {_where(reports[rank])}" for rank in sorted(apart)[:20]]
    if len(apart) > 20:
        lines.append(f"and {len(apart) - 20} more, {_ranks(sorted(apart)[20:])}")
    rest = sorted(set(reports) - set(apart))
    if rest:
        label = "The others" if apart else "All are at the same line, perhaps a collective that never ends"
        which = f"{_ranks(rest)}, e.g. " if len(rest) > 1 else ""
        lines.append(f"{label}: {which}{_where(reports[rest[0]])}")
    return "\n".join(lines)


def _where(report: Report) -> str:
    return (
        f"rank {report['rank']} on {report['host']}, in phase {report['phase']} of step {report['step']}, micro-step "
        f"{report['micro_step']} of {report['of']}, since {report['since']}, at {report['at']}"
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" ... {ranks[-1]}" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown} ({len(ranks)})"
