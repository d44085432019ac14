"""A disk that stops: after any operation, keeping everything, or no more than what was synchronised."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from src.disk import durable

OPERATIONS = ("fsync", "rename", "replace", "symlink", "unlink", "rmdir", "mkdir")


class Stop(BaseException):
    """The process is gone: nothing but this test catches it."""


class Disk:
    """Counts the operations on files and folders below `root`, and stops for good before one of them.

    It knows what a power cut would leave: of each folder the names, and of each file the content, that it had when it
    was last synchronised.
    """

    def __init__(self, root: Path, stop_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.left, self.stopped = root, stop_before, False
        self._folders: dict[int, dict[str, tuple[str, Any]]] = {root.stat().st_ino: {}}
        self._contents: dict[int, bytes] = {}
        self._open: list[int] = []  # so that no inode's number is used twice
        self._fsync, self._write = os.fsync, durable.CheckedFile.write
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(durable.CheckedFile, "write", lambda file, data: self._half_written(file, data))

    def _count(self) -> None:
        self.left -= 1
        self.stopped = self.stopped or self.left < 0

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._count()
            if self.stopped:
                raise Stop
            result = operation(*args, **kwargs)
            if operation is self._fsync:
                self._note(args[0])
            return result

        return call

    def _half_written(self, file: durable.CheckedFile, data: Any) -> int:
        """Half of the write that the stop falls into; torch.save's C++ would lose an exception."""
        before = self.stopped
        self._count()
        if not before:
            self._write(file, memoryview(data).cast("B")[: len(data) // 2] if self.stopped else data)
        return len(data)

    def _note(self, descriptor: int) -> None:
        self._open.append(os.dup(descriptor))
        inode = os.fstat(descriptor).st_ino
        path = Path(f"/proc/self/fd/{descriptor}")
        if not path.is_dir():
            self._contents[inode] = path.read_bytes()
            return
        self._folders[inode] = {
            entry.name: ("link", os.readlink(entry.path))
            if entry.is_symlink()
            else ("folder" if entry.is_dir() else "file", entry.inode())
            for entry in os.scandir(descriptor_path(descriptor))
        }

    def after_power_cut(self, target: Path) -> Path:
        """Makes `target` what `root` would be after a power cut."""
        self._rebuild(self.root.stat().st_ino, target)
        return target

    def _rebuild(self, inode: int, target: Path) -> None:
        os.makedirs(target)
        for name, (kind, what) in self._folders.get(inode, {}).items():
            if kind == "link":
                (target / name).symlink_to(what)
            elif kind == "folder":
                self._rebuild(what, target / name)
            else:
                (target / name).write_bytes(self._contents.get(what, b""))

    def close(self) -> None:
        for descriptor in self._open:
            os.close(descriptor)


def descriptor_path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


@contextmanager
def full_disk(size: int = 1024) -> Iterator[None]:
    """No file grows beyond `size` bytes; the error differs from a full disk's in its number alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
