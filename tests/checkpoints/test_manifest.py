"""What a checkpoint's manifest finds, and what it says then."""

import errno
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from src.checkpoints import manifest
from src.checkpoints.manifest import MANIFEST, FileRecord, check_manifest, dump_manifest
from src.disk.durable import seal
from src.errors import UserError
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


@pytest.mark.parametrize("kind", ["missing", "of no bytes", "of no files", "of fewer files"])
def test_what_no_manifest_lists_is_refused_unless_it_is_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    folder = make(tmp_path / "step=1.ckpt")
    (folder / "checkpoint/.nfs0001").touch()  # a client's own
    with caplog.at_level(logging.WARNING):
        check_manifest(folder)
    assert not caplog.records
    manifest, whole = folder / MANIFEST, json.loads((folder / MANIFEST).read_text())
    del whole["files"]["checkpoint/3.pt"]
    if kind == "missing":
        manifest.unlink()
    else:
        whole |= {"files": {}} if kind == "of no files" else {}
        manifest.write_text("" if kind == "of no bytes" else json.dumps(whole))
    with pytest.raises(UserError, match="bad files?; if you trust it, --accept_unlisted true; else .* copy") as caught:
        check_manifest(folder)
    named = MANIFEST if kind in ("missing", "of no bytes") else "checkpoint/3.pt"
    assert named in str(caught.value)
    with caplog.at_level(logging.WARNING):
        check_manifest(folder, accept_unlisted=True)
    assert named in caplog.text
    if kind == "of fewer files":  # what it does list is checked all the same
        flip(folder / "checkpoint/2.pt")
        with pytest.raises(UserError, match=r"2\.pt: its content changed"):
            check_manifest(folder, accept_unlisted=True)
    older = make(tmp_path / "step=0.ckpt")
    with pytest.raises(UserError, match=f"--ckpt_path {older}"):
        check_manifest(folder)
    make(tmp_path / "step=3.ckpt")
    with pytest.raises(UserError, match=f"--ckpt_path {tmp_path / 'step=3.ckpt'}"):
        check_manifest(folder)


def test_every_bad_file_is_named_with_what_to_use_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(ValueError, match="3 bad files"):  # small ones are read in any case
        check_manifest(newest, checksums=False)
    monkeypatch.setattr(manifest, "SMALL", 999)
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


def test_a_damaged_manifest_and_one_of_the_future_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "step=1.ckpt")
    file = folder / MANIFEST
    text = file.read_text()
    whole = json.loads(text)
    record = whole["files"]["checkpoint/0.pt"]
    for damaged, said in (
        (text[:100], "is not valid JSON"),
        (b"\xff" * 9, "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "is not a JSON object"),
        ({"format": 1}, "is damaged: KeyError"),
        (whole | {"format": "1"}, "is damaged: TypeError"),
        (whole | {"files": [1]}, "is damaged: AttributeError"),
        (whole | {"files": {"a": 1}}, "is damaged: TypeError"),
        (whole | {"files": {"a": record | {"rank": "0"}}}, "is damaged: a has"),
        (whole | {"files": {"a": record | {"bytes": None}}}, "is damaged: a has"),
        (whole | {"files": {"../../a": record}}, "is damaged: ../../a has"),
        (whole | {"format": 2}, "format 2, this version reads up to 1; update it"),
    ):
        file.write_bytes(damaged if isinstance(damaged, bytes) else _text(damaged).encode())
        for accept in (False, True):
            with pytest.raises(UserError, match=f"{MANIFEST} .*{said}"):
                check_manifest(folder, accept_unlisted=accept)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_opened(tmp_path: Path, put: Any) -> None:
    folder = make(tmp_path / "step=1.ckpt")
    for name in ("checkpoint/0.pt", MANIFEST):
        (folder / name).unlink()
        put(folder / name)
        with pytest.raises(UserError, match=f"{name}: missing"):
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
