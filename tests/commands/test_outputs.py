"""An output file that cannot be written is found by trying, before anything else, and what fails later is one line."""

import errno
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from src.commands import plan, preflight
from src.commands.check_data import CheckDataCLI
from src.commands.outputs import PICTURES, TRACES, check_output, writes
from src.commands.plan import PlanCLI
from src.commands.preflight import PreflightCLI
from src.errors import UserError

TINY = ["--config", "configs/tiny_cpu.yaml"]


def refused(where: Path) -> str:
    """What is there: what stands in the way is made first."""
    match where.name:
        case "folder":
            where.mkdir()
        case "fifo":
            os.mkfifo(where)
        case "link":
            where.symlink_to(where.parent / "nowhere" / "file")
        case "loop":
            where.symlink_to(where)
    return str(where)


@pytest.mark.parametrize("name", ["folder", "fifo", "link", "loop", "nowhere/file"])
def test_what_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    path = refused(tmp_path / name)
    with pytest.raises(UserError, match=f"^--x {path} cannot be written: .*. Give a file in a folder that is there"):
        check_output("--x", path)


@pytest.mark.parametrize("path", ["/proc/t.json", "/proc/sys/t.json", "/sys/t.json"])  # nobody writes there
def test_root_is_refused_too(path: str) -> None:
    with pytest.raises(UserError, match=f"^--x {path} cannot be written: "):
        check_output("--x", path)


@pytest.mark.parametrize("suffixes", [PICTURES, TRACES])
def test_a_file_that_can_be_written_is_left_as_it_is(suffixes: tuple[str, ...], tmp_path: Path) -> None:
    for suffix in suffixes:
        there, new = tmp_path / f"there{suffix}", tmp_path / f"new{suffix}"
        there.write_text("kept")
        check_output("--x", str(there), suffixes)
        check_output("--x", str(new), suffixes)
        assert there.read_text() == "kept" and not new.exists()
        with pytest.raises(UserError, match=rf"\.txt has another suffix; use one of \{suffixes[0]}, "):
            check_output("--x", f"{new}.txt", suffixes)
    check_output("--x", None, suffixes)
    check_output("--x", "/dev/null")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EROFS])
def test_an_error_while_it_is_written_is_one_line(number: int) -> None:
    with pytest.raises(UserError, match=f"^--x out cannot be written: {os.strerror(number)}"), writes("--x", "out"):
        raise OSError(number, os.strerror(number))
    with pytest.raises(UserError, match="^out could not be written: No space left.*are free"), writes("--x", "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(KeyError), writes("--x", "out"):  # a mistake of ours
        raise KeyError


def test_check_data_and_preflight_refuse_before_they_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="--html /proc/page.html cannot be written: "):
        CheckDataCLI([*TINY, "--html=/proc/page.html"])
    with pytest.raises(SystemExit) as stop:
        PreflightCLI([*TINY, "--write=/proc/cluster.yaml"])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "--write /proc/cluster.yaml cannot be written: " in printed.err
    assert not printed.out


def fails(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_preflights_other_ranks_are_released_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(preflight, "write_cluster", fails)
    monkeypatch.setattr(preflight, "_look", lambda *_: None)
    monkeypatch.setattr(preflight, "_look_together", lambda *_: None)
    monkeypatch.setattr(preflight, "cluster", lambda *_: {})
    with pytest.raises(UserError, match=f"^--write {tmp_path}/c.yaml cannot be written: Input/output error"):
        PreflightCLI([*TINY, f"--write={tmp_path}/c.yaml"])
    assert not dist.is_initialized()


@pytest.mark.parametrize(("option", "function"), [("--trace", "write_trace"), ("--picture", "draw")])
def test_a_plan_that_cannot_be_drawn_ends_in_one_line(
    option: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, function, fails)
    with pytest.raises(UserError, match=f"^{option} {tmp_path}/p.png cannot be written: Input/output error"):
        PlanCLI([*TINY, f"{option}={tmp_path}/p.png"])
    assert "tokens" in capsys.readouterr().out
