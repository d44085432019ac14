"""Which checkpoints a run keeps, and which one `last` means."""

from pathlib import Path

import pytest

from src.callbacks.step_checkpoint import LAST, StepCheckpoint, checkpoint_folder, step_of
from src.commands.checks import find_checkpoint, refuse_older


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps is -1; it must be 0 .at the end only. or more"):
        StepCheckpoint(every_n_train_steps=-1)
    with pytest.raises(ValueError, match="keep is 0; at least the newest checkpoint is kept"):
        StepCheckpoint(keep=0)


@pytest.mark.parametrize(
    ("name", "step"), [("step=12.ckpt", 12), ("step=12.ckpt.incomplete", -1), ("step=x.ckpt", -1), ("best.ckpt", -1)]
)
def test_steps_by_name(name: str, step: int) -> None:
    assert step_of(Path(name)) == step


def test_the_newest_are_kept_by_step_and_not_by_name(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    for name in ("step=8.ckpt", "step=9.ckpt", "step=10.ckpt", "step=7.ckpt.incomplete", "best.ckpt"):
        (folder / name / "checkpoint").mkdir(parents=True)
    StepCheckpoint(keep=2)._make_last(0.0, folder / "step=10.ckpt")
    assert {p.name for p in folder.iterdir()} == {LAST, "step=10.ckpt", "step=9.ckpt", "best.ckpt"}
    assert (folder / LAST).resolve() == folder / "step=10.ckpt"


def test_last_is_the_newest_checkpoint_also_where_a_kill_has_left_the_link_behind(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    for step in (3, 6):
        (folder / f"step={step}.ckpt").mkdir(parents=True)
    (folder / LAST).symlink_to("step=3.ckpt")
    found = find_checkpoint("last", str(tmp_path))
    assert found == folder / "step=6.ckpt"
    refuse_older(found, str(tmp_path))
