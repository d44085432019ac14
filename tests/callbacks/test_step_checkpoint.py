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


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_was_written_last_is_never_removed(tmp_path: Path, keep: int) -> None:
    folder = checkpoint_folder(tmp_path)
    for name in ("step=4.ckpt", "step=5.ckpt", "step=2.ckpt"):  # 4 and 5 of another run, say
        (folder / name / "checkpoint").mkdir(parents=True)
    StepCheckpoint(keep=keep)._make_last(0.0, folder / "step=2.ckpt")
    kept = {"step=2.ckpt", "step=5.ckpt", "step=4.ckpt"} if keep == 3 else {"step=2.ckpt", "step=5.ckpt"}
    assert {p.name for p in folder.iterdir()} - {LAST} == (kept if keep > 1 else {"step=2.ckpt"})
    assert (folder / LAST).resolve() == folder / "step=2.ckpt"


def test_another_runs_checkpoint_is_not_continued_among_those_that_are_there(tmp_path: Path) -> None:
    for run, step in (("a", 1), ("b", 4)):
        (checkpoint_folder(tmp_path / run) / f"step={step}.ckpt").mkdir(parents=True)
    foreign = find_checkpoint(str(checkpoint_folder(tmp_path / "a") / "step=1.ckpt"), str(tmp_path / "b"))
    with pytest.raises(
        ValueError, match="belongs to another run, and .*already holds checkpoints, the newest step=4.ckpt"
    ):
        refuse_older(foreign, str(tmp_path / "b"))
    refuse_older(foreign, str(tmp_path / "c"))  # a folder of its own


def test_last_is_the_newest_checkpoint_also_where_a_kill_has_left_the_link_behind(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    for step in (3, 6):
        (folder / f"step={step}.ckpt").mkdir(parents=True)
    (folder / LAST).symlink_to("step=3.ckpt")
    found = find_checkpoint("last", str(tmp_path))
    assert found == folder / "step=6.ckpt"
    refuse_older(found, str(tmp_path))
