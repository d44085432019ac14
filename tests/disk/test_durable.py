"""Files that are counted while they are written, and what a full disk does to them."""

import errno
import os
import resource
import zlib
from pathlib import Path

import pytest
import torch

from src.disk.durable import CHUNK, CheckedFile, make_folder, point, remove, remove_leftovers, seal


def test_a_file_is_counted_as_it_lies_on_the_disk(tmp_path: Path) -> None:
    large = torch.randn(CHUNK // 4 + 1000)
    state = {"large": large, "small": torch.arange(3), "text": "x"}
    reported: list[int] = []
    with CheckedFile(tmp_path / "state.pt", reported.append) as file:
        torch.save(state, file)  # type: ignore[arg-type]
    content = (tmp_path / "state.pt").read_bytes()
    assert (file.bytes, file.crc32) == (len(content), f"{zlib.crc32(content):08x}") == seal(tmp_path / "state.pt")
    assert sum(reported) == len(content) and len(reported) == 2 and reported[0] >= CHUNK
    loaded = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    assert loaded["text"] == "x" and torch.equal(loaded["large"], large)


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "state.pt").touch()
    with pytest.raises(FileExistsError):
        CheckedFile(tmp_path / "state.pt")


def test_the_systems_own_error_comes_out_of_torch_save(tmp_path: Path) -> None:
    """A real one, from the kernel: torch.save alone would say `unexpected pos 457 vs 401`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(OSError, match="File too large") as caught, CheckedFile(tmp_path / "state.pt") as file:
            torch.save(torch.randn(100_000), file)  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "state.pt").stat().st_size <= 100_000


def test_folders_links_and_removals(tmp_path: Path) -> None:
    folder = tmp_path / "a/b/checkpoints"
    make_folder(folder)
    for name in ("step=1.ckpt", "step=2.ckpt"):
        make_folder(folder / name)
        point(folder / "last.ckpt", name)
        assert os.readlink(folder / "last.ckpt") == name
    (folder / "step=1.ckpt/file").touch()
    remove([folder / "step=1.ckpt"])
    make_folder(folder / "step=3.ckpt.incomplete/checkpoint")
    make_folder(folder / "notes.incomplete")  # not ours
    remove_leftovers(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["last.ckpt", "notes.incomplete", "step=2.ckpt"]
