"""Ranks that import early go on as the ranks that they are told to be, or end with the first process."""

from pathlib import Path

import pytest

from src.strategies import early_ranks
from src.strategies.early_ranks import LAUNCHED, release, start

WAITER = "tests.strategies.waiter"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def test_they_go_on_when_they_are_told(tmp_path: Path) -> None:
    start(WAITER, [f"{tmp_path}/rank"], devices=3)
    assert not release([{"LOCAL_RANK": "1"}])  # as many as were started, or Lightning starts its own
    shared = {"WORLD_SIZE": "3", "MASTER_PORT": "1234"}
    processes = release([shared | {"LOCAL_RANK": str(rank)} for rank in (1, 2)])
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [(tmp_path / f"rank.{rank}").read_text() for rank in (1, 2)] == ["1 3 1234", "2 3 1234"]
    assert not release([]) and not list(early_ranks._waiting)


def test_they_end_with_the_first_process(tmp_path: Path) -> None:
    start(WAITER, [f"{tmp_path}/rank"], devices=2)
    early_ranks._end()
    ((process, _),) = early_ranks._waiting
    assert process.returncode is not None and not list(tmp_path.iterdir())
    early_ranks._waiting.clear()


def test_a_launcher_starts_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    start(WAITER, [f"{tmp_path}/rank"], devices=2)
    assert not early_ranks._waiting
