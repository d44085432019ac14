"""Free space, checked on every rank before anything is written; errors of a full disk."""

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from src.errors import UserError


@dataclass(frozen=True)
class Room:
    """The free space that a process sees at a folder, which need not exist yet."""

    host: str
    folder: str  # the nearest existing one
    free: int  # bytes that this user may write

    @classmethod
    def at(cls, path: Path) -> "Room":
        folder = next(f for f in (path, *path.absolute().parents) if os.path.exists(f))  # False where it may not look
        return cls(socket.gethostname(), str(folder), shutil.disk_usage(folder).free)

    def __str__(self) -> str:
        return f"{self.free:,} bytes are free in {self.folder} on {self.host}"


def try_to_write(folder: Path) -> None:
    """Writes a file in a folder, down to the disk, which is gone at once. Raises OSError where that cannot be."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0" * 4096)
        file.flush()
        os.fsync(file.fileno())


def check_room(path: Path, needed: int, what: str) -> None:
    """Raises if there is not enough free space.

    Args:
        needed: bytes that all processes together are about to write below `path`.
        what: names what will be written, for the error.

    Raises:
        ValueError: there is less room; with both numbers and what to do.
    """
    room = Room.at(path)
    if needed > room.free:
        raise UserError(
            f"{path}: {what} takes {needed:,} bytes, and only {room}. Make room there, or write to another disk; "
            f"nothing was begun (df -h {os.fspath(room.folder)})"
        )


_FULL = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


@contextmanager
def named_if_full(path: Path, option: str = "") -> Iterator[None]:
    """Around what writes `path`, a file or a folder with all that is in it.

    Raises:
        UserError: the disk is full, or a quota or a limit is reached; names the path and what is free.
    """
    try:
        yield
    except Exception as error:
        reason, cause = "", cast(BaseException | None, error)
        while cause is not None and not reason:  # another process's error arrives as text only
            reason = next((text for number, text in _FULL.items() if f"[Errno {number}]" in str(cause)), "")
            cause = cause.__cause__ or cause.__context__
        if not reason:
            raise
        folder = next(f for f in (path, *path.absolute().parents) if os.path.exists(f))
        free, elsewhere = shutil.disk_usage(folder).free, option and f" ({option})"
        raise UserError(
            f"{path} could not be written: {reason}, {free:,} bytes are free in {folder}. "
            f"Make room there, or write to another disk{elsewhere}."
        ) from error
