"""Which rank is named, of what the ranks have written; how long is too long."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from src.callbacks.watchdog import COLLECTIVES, Report, Watchdog, describe
from src.strategies import DeepSpeedSPStrategy
from tests.test_pages import pasted, shape

GATHER = f"/site-packages/{COLLECTIVES}distributed_c10d.py:4012 in all_gather_into_tensor"
STREAM = "/src/models/experts.py:180 in forward"


def report(rank: int, changes: int = 80, at: str = GATHER, phase: str = "forward") -> Report:
    where = {"host": f"node-{rank // 8}", "step": 12, "micro_step": 3, "of": 4, "phase": phase, "at": at}
    return {"rank": rank, "changes": changes, "since": "2026-01-02 03:04:05", "seconds": 901, **where}


def told(*reports: Report, world_size: int | None = None) -> list[str]:
    return describe({report["rank"]: report for report in reports}, world_size or len(reports)).splitlines()


def test_a_rank_with_fewer_phases_behind_it_is_slow() -> None:
    ranks = [report(rank) for rank in range(256)]
    ranks[17] = report(17, changes=79, at="/usr/lib/socket.py:33 in recv", phase="data")
    lines = told(*ranks)
    assert lines == [
        "No progress for 901 s: the run hangs. 256 of 256 ranks reported.",
        "The slow rank is behind the others: rank 17 on node-2, in phase data of step 12, micro-step 3 of 4, since "
        "2026-01-02 03:04:05, at /usr/lib/socket.py:33 in recv",
        "The others: ranks 0, 1, 2, 3, 4, 5, 6, 7 ... 255 (255), e.g. rank 0 on node-0, in phase forward of step 12, "
        f"micro-step 3 of 4, since 2026-01-02 03:04:05, at {GATHER}",
    ]
    assert shape("\n".join(lines)) == shape(pasted("docs/watching.md", "No progress"))


@pytest.mark.parametrize("usual", [GATHER, STREAM])
def test_in_the_same_phase_it_is_the_one_at_another_line(usual: str) -> None:
    lines = told(*(report(rank, at="/src/x.py:1 in f" if rank == 2 else usual) for rank in range(4)))
    assert lines[1].startswith("The slow rank is behind the others: rank 2 on node-0")
    assert lines[2].startswith("The others: ranks 0, 1, 3 (3), e.g. rank 0")


def test_of_two_ranks_the_one_outside_a_collective_is_slow() -> None:
    for slow in range(2):
        lines = told(*(report(rank, at=STREAM if rank == slow else GATHER) for rank in range(2)))
        assert lines[1].startswith(f"The slow rank is behind the others: rank {slow} on")


def test_ranks_that_say_nothing_come_first() -> None:
    lines = told(*(report(rank) for rank in (0, 1, 3)), world_size=4)
    assert lines[1].startswith("Nothing from rank 2: gone, unable to run Python, or still at work. Look there first.")
    assert lines[2].startswith("All are at the same line, perhaps a collective that never ends: ranks 0, 1, 3 (3)")


def watching(folder: Path, phase: str, still: float, first_step: bool) -> Watchdog:
    watchdog = Watchdog(minutes=1)
    phases: Any = SimpleNamespace(phase=phase, changed_at=time.monotonic() - still)
    trainer: Any = SimpleNamespace(global_step=5)
    watchdog._phases, watchdog._trainer, watchdog._folder = phases, trainer, folder
    watchdog._first_step = 5 if first_step else 0
    return watchdog


def test_how_long_is_too_long(tmp_path: Path) -> None:
    folder = tmp_path / "stacks"
    for phase, still, first_step, hangs in (
        ("forward", 50, False, False),
        ("forward", 70, False, True),
        ("forward", 200, True, False),
        ("checkpoint", 200, False, False),
        ("checkpoint", 300, False, True),
    ):
        assert watching(folder, phase, still, first_step)._hangs() == hangs, (phase, still, first_step)
    folder.mkdir()  # another rank's alarm
    assert watching(folder, "checkpoint", 40, False)._hangs() and not watching(folder, "forward", 20, False)._hangs()


def test_collectives_outlast_the_watchdog() -> None:
    strategy = DeepSpeedSPStrategy()
    strategy.wait_at_least(Watchdog(minutes=15).collective_minutes)
    assert strategy._timeout is not None and strategy._timeout.total_seconds() == 65 * 60
    strategy.wait_at_least(Watchdog(minutes=0).collective_minutes)  # off: what it was stays
    assert strategy._timeout.total_seconds() == 65 * 60


def test_a_negative_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"watchdog.minutes is -1; it must be 0 \(off\) or more"):
        Watchdog(minutes=-1)
