"""Files, folders and links that are whole or absent at whatever moment a process or its machine stops.

A file's content is safe once the file is synchronised, its name once its folder is; a rename is one step for everybody
who looks. So a folder is written under a name that says it is incomplete, synchronised inside out, and renamed.
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
    """Makes a file that is there already safe; returns its size and CRC-32."""
    with open(path, "rb") as file:
        crc32 = checksum(file)
        os.fsync(file.fileno())
        return file.tell(), crc32


def sync_file(path: Path) -> None:
    """Makes the content of a file that is there already safe."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder safe."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such promise to make
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, their names safe."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_folder(made.parent)


def publish(aside: Path, final: Path) -> None:
    """Renames a folder, whose files are safe, to its final name; an error leaves it where it was."""
    for folder, _, _ in os.walk(aside, topdown=False):
        sync_folder(Path(folder))
    os.rename(aside, final)
    try:
        sync_folder(final.parent)
    except OSError:
        os.rename(final, aside)
        raise


def point(link: Path, name: str) -> None:
    """Makes `link` a symbolic link to `name` beside it, in place of what it was."""
    aside = link.with_name(link.name + ".new")
    aside.unlink(missing_ok=True)
    os.symlink(name, aside)
    os.replace(aside, link)
    sync_folder(link.parent)


def remove(folders: list[Path]) -> None:
    """Removes folders of one parent, which from the first moment on no longer have the names of whole ones."""
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
    with suppress(OSError):  # somebody reads it, say: it stands in nobody's way, and is tried again at the next save
        shutil.rmtree(incomplete)
