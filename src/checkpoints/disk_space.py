"""Whether what is about to be written fits on the disk: asked before, of every rank's own view of the folder."""

import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from src.errors import UserError


@dataclass(frozen=True)
class Room:
    """What a process sees free where a folder is, or is to be."""

    host: str
    folder: str  # the nearest one that is there
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
    """Refuses to begin what cannot be ended.

    Args:
        needed: bytes that all processes together are about to write below `path`.
        what: is to be written, for the error.

    Raises:
        ValueError: there is less room; with both numbers and what to do.
    """
    room = Room.at(path)
    if needed > room.free:
        raise UserError(
            f"{path}: {what} takes {needed:,} bytes, and only {room}. Make room there, or write to another disk; "
            f"nothing was begun (df -h {os.fspath(room.folder)})"
        )
