"""What is written at a stop, after the save, costs the run nothing if it cannot be written."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from src.callbacks.step_checkpoint import StepCheckpoint
from src.callbacks.stop import WORTHWHILE, Stop


class Saved(StepCheckpoint):
    def save_and_wait(self, trainer: Any) -> None:
        """There is nothing to save."""


def stopped(marker: Path) -> Any:
    """The exit status of a run that is asked to stop."""
    stop = Stop(marker=str(marker))
    stop._signal = "SIGTERM"
    trainer: Any = SimpleNamespace(
        checkpoint_callbacks=[Saved()],
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
        **{"is_global_zero": True, "global_step": WORTHWHILE, "estimated_stepping_batches": 100},
    )
    with pytest.raises(SystemExit) as ended:
        stop._stop_if_asked(trainer)
    return ended.value.code


def test_a_marker_that_can_be_written_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert stopped(tmp_path / "new" / "marker") == 0
    assert json.loads((tmp_path / "new/marker").read_text()) == {"step": WORTHWHILE, "why": "SIGTERM"}
    assert "was not written" not in caplog.text


@pytest.mark.parametrize("place", ["folder", "file/marker", "/proc/marker", "/proc/new/marker"])
def test_a_marker_that_cannot_be_written_is_an_error_of_the_log(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    marker = tmp_path / place
    assert stopped(marker) == 0
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert record.getMessage().startswith(f"stop.marker {marker} was not written: ")
