"""Files, folders and links that are complete or absent, whenever a process or its machine stops.

fsync of a file makes its content durable, fsync of its folder its name; a rename is atomic. So a folder is written
under a name that marks it incomplete, synced inside out, and renamed.
"""

import errno
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

INCOMPLETE = ".incomplete"
# Bytes written and checksummed at a time; read in smaller pieces, which several threads of an export hold.
CHUNK, PIECE = 1 << 24, 1 << 20


class CheckedFile:
    """A new file, written from start to end with its size and CRC-32 counted; safe when the context ends without error.

    An error while writing is raised when the context ends: torch.save writes from C++, which would lose it.

    Args:
        path: must not exist.
        report: called with the number of bytes written since the last time, about every CHUNK and at the end.

    Raises:
        OSError: the file, which it names, could not be written.
    """

    def __init__(self, path: Path, report: Callable[[int], object] = lambda nbytes: None) -> None:
        self.bytes, self._crc = 0, 0
        self._report, self._reported = report, 0
        self._error: OSError | None = None
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed in __exit__

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        rest = view
        while len(rest) and self._error is None:
            try:
                written = self._file.write(rest[:CHUNK])
            except OSError as error:
                self._error = error
                break
            self._crc = zlib.crc32(rest[:written], self._crc)
            self.bytes += written
            rest = rest[written:]
            if self.bytes - self._reported >= CHUNK:
                self._tell()
        return len(view)

    def _tell(self) -> None:
        self._report(self.bytes - self._reported)
        self._reported = self.bytes

    def flush(self) -> None:
        """Nothing: there is no buffer."""

    @property
    def crc32(self) -> str:
        return f"{self._crc:08x}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            try:
                if self._error is not None:
                    raise self._error
                if kind is None:
                    self._tell()
                    os.fsync(self._file.fileno())
            except OSError as failed:
                failed.filename = self._file.name  # the system names it in no error of write or fsync
                raise


def checksum(file: BinaryIO, read: Callable[[int], object] = lambda nbytes: None) -> str:
    """CRC-32, in hexadecimal, of what is left of an open file; `read` is called with the bytes of each piece."""
    crc = 0
    while chunk := file.read(PIECE):
        crc = zlib.crc32(chunk, crc)
        read(len(chunk))
    return f"{crc:08x}"


def seal(path: Path) -> tuple[int, str]:
    """Syncs an existing file to disk; returns its size and CRC-32."""
    with open(path, "rb") as file:
        crc32 = checksum(file)
        os.fsync(file.fileno())
        return file.tell(), crc32


def sync_file(path: Path) -> None:
    """Syncs an existing file's content to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, with their names synced to disk."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_folder(made.parent)


def publish(aside: Path, final: Path) -> None:
    """Renames a folder whose files are synced to its final name; an error leaves it as it was."""
    for folder, _, _ in os.walk(aside, topdown=False):
        sync_folder(Path(folder))
    os.rename(aside, final)
    try:
        sync_folder(final.parent)
    except OSError:
        os.rename(final, aside)
        raise


def point(link: Path, name: str) -> None:
    """Replaces `link` by a symbolic link to `name` in the same folder."""
    aside = link.with_name(link.name + ".new")
    aside.unlink(missing_ok=True)
    os.symlink(name, aside)
    os.replace(aside, link)
    sync_folder(link.parent)


def remove(folders: list[Path]) -> None:
    """Removes folders of one parent; renames them first, so that a half-removed one does not look complete."""
    doomed = [folder.with_name(folder.name + INCOMPLETE) for folder in folders]
    for folder, aside in zip(folders, doomed, strict=True):
        os.rename(folder, aside)
    if folders:
        sync_folder(folders[0].parent)
    for aside in doomed:
        _remove_tree(aside)


def remove_leftovers(folder: Path) -> None:
    """Removes what interrupted saves and removals left among a folder's checkpoints."""
    with suppress(OSError):  # of one rank's alone
        for leftover in folder.glob(f"*.ckpt{INCOMPLETE}"):
            _remove_tree(leftover)


def _remove_tree(incomplete: Path) -> None:
    with suppress(OSError):  # somebody may be reading it; the next save tries again
        shutil.rmtree(incomplete)
