"""Free disk is looked at before anything is written, where it is going to be written."""

from pathlib import Path
from typing import Any

import pytest

from src.commands.export import export
from src.disk import space
from src.disk.space import Room, check_room
from src.errors import UserError
from tests.checkpoints.workers import Checkpoints
from tests.disk.full import full_disk


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What every folder's disk has free; the folders asked for."""
    usage: Any = type("Usage", (), {"free": 1000, "asked": []})

    def disk_usage(path: Any) -> Any:
        usage.asked.append(str(path))
        return usage

    monkeypatch.setattr(space.shutil, "disk_usage", disk_usage)
    return usage


def test_the_nearest_folder_that_is_there_is_asked(tmp_path: Path, disk: Any) -> None:
    check_room(tmp_path / "a/b/c", 1000, "it")
    assert disk.asked == [str(tmp_path)]
    with pytest.raises(ValueError, match=rf"a/b/c: it takes 1,001 bytes, and only 1,000 bytes .* {tmp_path} on "):
        check_room(tmp_path / "a/b/c", 1001, "it")
    assert Room.at(Path("nowhere/at all")).folder == str(Path.cwd())


def test_an_export_that_does_not_fit_is_not_begun(
    checkpoints: Checkpoints, tmp_path: Path, disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = str(checkpoints.folder / "stage 3"), tmp_path / "new folder/out"
    with pytest.raises(ValueError, match=r"the export to out takes [\d,]+ bytes, and only 1,000 .* Make room"):
        export(checkpoint, str(out), max_shard_size="500KB")
    assert not list(tmp_path.iterdir())
    # Interrupted, it needs only what is not there yet.
    disk.free = 10**12
    export(checkpoint, str(out), max_shard_size="500KB")
    files = sorted(out.glob("*.safetensors"))
    disk.free = sum(file.stat().st_size for file in files) // 2
    partial = out.rename(out.with_name("out.partial"))
    (partial / files[0].name).unlink()
    export(checkpoint, str(out), max_shard_size="500KB", resume=True)
    assert sorted(out.glob("*.safetensors")) == files


@pytest.mark.parametrize(("size", "named"), [(100_000, "model-00001-of-"), (300, "out.partial")])
def test_a_disk_that_fills_up_during_an_export_is_named(
    checkpoints: Checkpoints, tmp_path: Path, size: int, named: str
) -> None:
    said = rf"{tmp_path}/out.partial.* could not be written: File too large, [\d,]+ bytes are free in .*Make room"
    with full_disk(size), pytest.raises(UserError, match=said) as caught:
        export(str(checkpoints.folder / "stage 3"), str(tmp_path / "out"), max_shard_size="500KB")
    assert named in str(caught.value) and "\n" not in str(caught.value)
