"""A save that stops at any moment, fails, or is never heard of: the one before is there, and the next one works."""

import errno
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from src.callbacks.step_checkpoint import LAST, StepCheckpoint, step_of
from src.checkpoints import saving
from src.checkpoints.manifest import check_manifest
from src.checkpoints.saving import TAG, CheckpointSaver, SaveFailed
from src.disk import durable, space
from src.disk.durable import CheckedFile, remove_leftovers
from tests.disk.full import Disk, Stop
from tests.distributed.spawn import server

FILES = ("optim.pt", "model.pt")


@pytest.fixture(scope="module")
def saver() -> Iterator[CheckpointSaver]:
    yield from alone()


def alone() -> Iterator[CheckpointSaver]:
    """A saver in a world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield CheckpointSaver("127.0.0.1")
    dist.destroy_process_group()


def state(step: int, size: int = 1000) -> dict[str, Any]:
    return {"flat": torch.full((size,), float(step)), "step": step}


def save(saver: CheckpointSaver, folder: Path, step: int, asynchronous: bool = False, size: int = 1000) -> None:
    """As the strategy and the callback do it, keeping one."""
    aside = saver.begin(folder / f"step={step}.ckpt", asynchronous=asynchronous)
    for name in FILES:
        saver.save(state(step, size if name == "optim.pt" else 1), str(aside / TAG / name))
    side_files = {"files": {"run.json": "{}"}, "model_directory": str(folder), "tokenizer_directory": None}
    saver.start(side_files, partial(StepCheckpoint(keep=1)._make_last, 0.0))


def loaded(checkpoint: Path) -> int:
    """The step of a checkpoint, which must be whole and hold what was saved."""
    step = step_of(checkpoint)
    check_manifest(checkpoint)
    assert (checkpoint / "latest").read_text() == TAG and (checkpoint / "run.json").read_text() == "{}"
    for name in FILES:
        found = torch.load(checkpoint / TAG / name, weights_only=True)
        assert found["step"] == step and torch.all(found["flat"] == step)
    return step


def whole(folder: Path) -> list[int]:
    """The steps of a folder's checkpoints: all that have the name of one are, and the link leads to one of them."""
    steps = sorted(loaded(p) for p in folder.glob("step=*.ckpt") if step_of(p) >= 0)
    if (folder / LAST).is_symlink():
        assert loaded((folder / LAST).resolve(strict=True)) in steps
    return steps


def test_stopped_before_any_operation(
    saver: CheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two saves, stopped before each operation in turn, with all that was written and with what was synchronised."""
    kept: list[tuple[int, ...]] = []
    operation = 0
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the real one takes milliseconds
    while True:
        root = tmp_path / str(operation)
        root.mkdir()
        with monkeypatch.context() as patches:
            disk, done = Disk(root, operation, patches), 0
            with suppress(Stop):
                for step in (1, 2):
                    save(saver, root / "checkpoints", step)
                    done = step
        for case in (root, disk.after_power_cut(tmp_path / f"{operation}cut")):
            folder = case / "checkpoints"
            steps = whole(folder)
            kept.append((done, *steps))
            if done or steps:
                assert steps and set(steps) <= {done - 1, done, done + 1} and max(steps) >= done
            if done:
                assert step_of((folder / LAST).resolve()) in (done, done + 1)
            remove_leftovers(folder)  # as a run that goes on does
            save(saver, folder, 3)
            assert sorted(p.name for p in folder.iterdir()) == [LAST, "step=3.ckpt"] and whole(folder) == [3]
        disk.close()
        if done == 2:
            break
        operation += 1
    # Saves done, checkpoints there: among them the moments between a new one, the link and the removal of the old.
    assert operation > 100 and set(kept) == {(0,), (0, 1), (1, 1), (1, 1, 2), (1, 2), (2, 2)}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def train_until_killed(folder: Path) -> None:
    """Goes on from the newest checkpoint, one save after another, slowly, while the state changes under them."""
    torch.set_num_threads(1)
    write = CheckedFile.write

    def slowly(self: CheckedFile, data: bytes | memoryview) -> int:
        time.sleep(0.0005)
        return write(self, data)

    CheckedFile.write = slowly  # type: ignore[method-assign]
    saver = next(alone())
    remove_leftovers(folder)
    for step in range(max(whole(folder), default=0) + 1, 1000):
        save(saver, folder, step, asynchronous=True, size=100_000)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    context, generator = server(), random.Random(0)
    reached, leftovers = 0, 0
    for _ in range(25):
        process = context.Process(target=train_until_killed, args=(folder,))
        process.start()
        while max(map(step_of, folder.glob("step=*.ckpt")), default=0) <= reached:
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(generator.uniform(0.0, 0.15))
        process.kill()
        process.join()
        steps = whole(folder)
        assert steps and max(steps) > reached and step_of((folder / LAST).resolve()) >= max(steps) - 1
        reached = max(steps)
        leftovers += len(list(folder.glob("*.incomplete")))
    assert reached >= 26 and leftovers > 5  # many fell into the middle of a save


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Writes of files whose name is in the dictionary fail with its error."""
    errors: dict[str, int] = {}
    opened = open

    class Full:
        def __init__(self, path: Path, *args: Any, **kwargs: Any) -> None:
            self.file, self.error = opened(path, *args, **kwargs), errors.get(path.name)

        def write(self, data: Any) -> int:
            if self.error is not None:
                raise OSError(self.error, os.strerror(self.error))
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.close()

    monkeypatch.setattr(durable, "open", lambda path, mode, **kw: Full(path, mode, **kw), raising=False)
    yield errors


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        (
            "model.pt",
            errno.ENOSPC,
            r"No space left on device. It takes 4,004 bytes, and [\d,]+ bytes are free in .* Make room there, keep",
        ),
        ("optim.pt", errno.EDQUOT, "A quota is used up"),
        ("model.pt", errno.EIO, "Input/output error.* Look into that first"),
        ("manifest.json", errno.ENOSPC, "No space left on device.* Make room there"),
    ],
)
def test_a_full_disk_is_one_error_and_the_next_save_works(
    saver: CheckpointSaver,
    tmp_path: Path,
    failing: dict[str, int],
    caplog: pytest.LogCaptureFixture,
    asynchronous: bool,
    name: str,
    error: int,
    says: str,
) -> None:
    save(saver, tmp_path, 1)
    failing[name] = error
    save(saver, tmp_path, 2, asynchronous)
    message = rf"step=2.ckpt was not saved. Rank 0 could not write .*{name}: .*{says}"
    for _ in range(2):  # for as long as the last save is a failed one
        with pytest.raises(SaveFailed, match=message):
            saver.wait()
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    assert "earlier checkpoints are untouched, and the next save tries again" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == [LAST, "step=1.ckpt"] and whole(tmp_path) == [1]
    failing.clear()
    save(saver, tmp_path, 2, asynchronous)
    saver.wait()
    assert whole(tmp_path) == [2]


def test_what_cannot_fit_is_not_begun(saver: CheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 4000  # the two files hold 4004 bytes
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage)
    save(saver, tmp_path, 1, asynchronous=True)
    with pytest.raises(
        SaveFailed,
        match="The disk is too small for it. It takes 4,004 bytes, and 4,000 bytes are free in .* Make room there",
    ):
        saver.wait()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(usage, "free", 4004)
    save(saver, tmp_path, 1, asynchronous=True)
    saver.wait()
    assert whole(tmp_path) == [1]


def test_a_node_whose_own_disk_is_too_small_is_named(
    saver: CheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the folder is not mounted there: rank 0 sees room enough."""

    def gather(found: list[Any], ours: Any) -> None:
        found[:] = [ours, (None, 1000, space.Room("node7", "/", 5000))]

    monkeypatch.setattr(saver, "_world_size", 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    save(saver, tmp_path, 1, asynchronous=True)
    with pytest.raises(SaveFailed, match="It takes 5,004 bytes, and 5,000 bytes are free in / on node7. Make room"):
        saver.wait()
    assert not list(tmp_path.iterdir())


def test_a_copy_that_does_not_fit_into_memory_is_an_error_like_others(
    saver: CheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(*_: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(saving, "host_copy", copy)
    save(saver, tmp_path, 1, asynchronous=True)
    with pytest.raises(SaveFailed, match="Rank 0 could not write .*Cannot allocate memory"):
        saver.wait()
    save(saver, tmp_path, 1, asynchronous=False)  # which needs none
    assert whole(tmp_path) == [1]


def test_a_checkpoint_is_never_overwritten(saver: CheckpointSaver, tmp_path: Path) -> None:
    save(saver, tmp_path, 1)
    with pytest.raises(ValueError, match=r"step=1.ckpt exists already.* move it away, or save to another path"):
        save(saver, tmp_path, 1)


def test_what_happens_after_the_save_has_begun_does_not_reach_it(saver: CheckpointSaver, tmp_path: Path) -> None:
    gate, entered = threading.Event(), CheckedFile.__enter__

    def held(file: CheckedFile) -> CheckedFile:
        gate.wait()
        return entered(file)

    training = state(1)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(CheckedFile, "__enter__", held)
        aside = saver.begin(tmp_path / "step=1.ckpt", asynchronous=True)
        saver.save(training, str(aside / TAG / "optim.pt"))
        saver.start()
        training["flat"].zero_()
        training["step"] = 2
        assert not (tmp_path / "step=1.ckpt").exists()
        gate.set()
        saver.wait()
    found = torch.load(tmp_path / "step=1.ckpt" / TAG / "optim.pt", weights_only=True)
    assert found["step"] == 1 and torch.all(found["flat"] == 1)


def test_a_rank_that_is_never_heard_of_holds_nobody_for_ever(
    saver: CheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saving, "PATIENCE_AFTER_ERROR", 0.2)
    monkeypatch.setattr(saver, "_patience", saving.PATIENCE)  # put back afterwards
    save(saver, tmp_path, 1)
    monkeypatch.setattr(saver, "_world_size", 2)  # of which the other was lost
    with monkeypatch.context() as patches:
        patches.setattr(dist, "all_gather_object", lambda found, ours: found.__setitem__(slice(None), [ours, ours]))
        save(saver, tmp_path, 2, asynchronous=True)
    saver.close()
    assert "no word from ranks [1], and nothing written for 0 s" in caplog.text
    assert whole(tmp_path) == [1] and not list(tmp_path.glob("*.incomplete"))
