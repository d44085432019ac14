"""What a checkpoint's manifest finds, and what it says then."""

import errno
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from src.checkpoints import manifest
from src.checkpoints.durable import seal
from src.checkpoints.manifest import MANIFEST, FileRecord, check_manifest, dump_manifest
from tests.distributed.spawn import run_distributed


def make(folder: Path, files: int = 5) -> Path:
    """A checkpoint in which rank r wrote `checkpoint/r.pt`, written without the code that saves."""
    (folder / "checkpoint").mkdir(parents=True)
    records = {}
    for rank in range(files):
        name = f"checkpoint/{rank}.pt"
        (folder / name).write_bytes(bytes([rank]) * 1000)
        records[name] = FileRecord(*seal(folder / name), rank)
    (folder / MANIFEST).write_text(dump_manifest(records, files))
    return folder


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)


def test_a_whole_checkpoint_passes_and_an_older_one_is_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(tmp_path / "step=1.ckpt")
    with caplog.at_level(logging.WARNING):
        check_manifest(folder)
        assert not caplog.records
        (folder / MANIFEST).unlink()
        check_manifest(folder)
    assert "has no manifest.json: its files are taken as they are" in caplog.text


def test_every_bad_file_is_named_with_what_to_use_instead(tmp_path: Path) -> None:
    older, newest = make(tmp_path / "step=1.ckpt"), make(tmp_path / "step=2.ckpt")
    (newest / "checkpoint/0.pt").unlink()
    (newest / "checkpoint/1.pt").write_bytes(b"short")
    flip(newest / "checkpoint/2.pt")
    (tmp_path / "last.ckpt").symlink_to("step=2.ckpt")
    with pytest.raises(ValueError, match="3 bad files; move it away and use .* --ckpt_path ") as caught:
        check_manifest(tmp_path / "last.ckpt")
    message = str(caught.value)
    assert "0.pt: missing" in message and "1.pt: torn, 5 of 1000 bytes" in message
    assert re.search(r"2\.pt: its content changed, CRC-32 \w{8} instead of \w{8}", message) and "3.pt" not in message
    assert str(older) in message
    with pytest.raises(ValueError, match="2 bad files"):  # without reading, what changed inside goes unseen
        check_manifest(newest, checksums=False)
    (older / "checkpoint/4.pt").unlink()
    with pytest.raises(ValueError, match="no other checkpoint in .* is whole, so use a copy from elsewhere"):
        check_manifest(newest)


def test_the_ranks_share_the_reading(tmp_path: Path) -> None:
    folder = make(tmp_path / "step=1.ckpt")
    flip(folder / "checkpoint/3.pt")
    for world_size in (1, 2, 3, 7):
        failing = []
        for rank in range(world_size):
            try:
                check_manifest(folder, rank=rank, world_size=world_size)
            except ValueError:
                failing.append(rank)
        assert failing == [3 % world_size]


def test_a_torn_manifest_and_one_of_the_future_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "step=1.ckpt")
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[:100])
    with pytest.raises(ValueError, match="manifest.json is torn"):
        check_manifest(folder)
    (folder / MANIFEST).write_text(json.dumps(json.loads(text) | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, this version reads up to 1; update it"):
        check_manifest(folder)


def check(folder: Path) -> str:
    dist.init_process_group("gloo")
    try:
        check_manifest(folder, rank=dist.get_rank(), world_size=2)
    except ValueError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""


def test_every_rank_raises_the_same_list(tmp_path: Path) -> None:
    folder = make(tmp_path / "step=1.ckpt")
    flip(folder / "checkpoint/0.pt")
    flip(folder / "checkpoint/1.pt")
    first, second = run_distributed(check, 2, folder)
    assert first == second and "2 bad files" in first and "0.pt" in first and "1.pt" in first


def check_unreadable(folder: Path) -> str:
    read = manifest.read_manifest

    def fails(directory: Path) -> Any:
        if dist.get_rank() == 1:  # a mount that one node has lost
            raise OSError(errno.EIO, "Input/output error", str(directory / MANIFEST))
        return read(directory)

    manifest.read_manifest = fails
    return check(folder)


def test_what_one_rank_cannot_read_stops_all(tmp_path: Path) -> None:
    first, second = run_distributed(check_unreadable, 2, make(tmp_path / "step=1.ckpt"))
    assert first == second and "Input/output error" in first and MANIFEST in first
