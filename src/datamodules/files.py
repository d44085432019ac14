"""Data files: expands patterns, decompresses, and digests."""

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

import pyarrow as pa

from src.errors import UserError

# What `open_bytes` and reads from it raise for a truncated or damaged file.
STREAM_ERRORS = (OSError, EOFError, zlib.error)

_GZIP = b"\x1f\x8b"
_ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60)))  # skippable frames
_PIECE = 16 << 20  # bytes that one thread hashes at a time


class NoMatch(UserError):
    """A pattern that no file matches."""


def expand(patterns: Sequence[str]) -> list[str]:
    """Files that the patterns match, in the patterns' order, sorted within each.

    A pattern that is a file's name means that file, even with brackets.

    Raises:
        NoMatch: a pattern matches no file.
        ValueError: a file cannot be read, or is named twice, by whatever spelling or link.
    """
    paths, problems = look_up(patterns)
    if problems:
        raise problems[0]
    return paths


def look_up(patterns: Sequence[str]) -> tuple[list[str], list[ValueError]]:
    """As `expand`, but returns every problem instead of raising the first."""
    paths: list[str] = []
    problems: list[ValueError] = []
    names: dict[tuple[int, int], str] = {}  # (device, inode) -> how the file is named first
    for pattern in patterns:
        exact = os.path.lexists(pattern)
        matches = [pattern] if exact else dict.fromkeys(sorted(glob.glob(pattern, recursive=True)))
        files = [path for path in matches if not os.path.isdir(path)]
        if not files:
            problems.append(
                NoMatch(
                    f"no file matches {pattern!r} (working directory {Path.cwd()}): give an existing JSON, JSONL or "
                    "Parquet file, or a glob such as 'data/*.jsonl'"
                )
            )
        for path in files:
            name = repr(path) if path == pattern else f"{path!r} (matched by {pattern!r})"
            try:
                status = os.stat(path)
            except OSError as error:
                what = "is a link to nothing" if os.path.islink(path) else f"cannot be read ({error.strerror})"
                problems.append(UserError(f"{name} {what}; repair it or leave it out"))
                continue
            if not S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
                what = "cannot be read; change its permissions" if S_ISREG(status.st_mode) else "is not a regular file"
                problems.append(UserError(f"{name} {what} or leave it out"))
                continue
            first = names.setdefault((status.st_dev, status.st_ino), name)
            if len(names) == len(paths):
                problems.append(
                    UserError(
                        f"{name} is the same file as {first}; name it once (--data.train_weights repeats the rows of "
                        "a file)"
                    )
                )
                continue
            paths.append(path)
    return paths, problems


@contextmanager
def open_bytes(path: str, start: int = 0) -> Iterator[BinaryIO]:
    """A file's bytes from `start` on; of a gzip or zstd file both refer to the decompressed bytes.

    Raises:
        OSError, EOFError, zlib.error: also from reading; the file is cut or damaged (`STREAM_ERRORS`).
    """
    with open(path, "rb") as file:
        packed = _compression(file.read(4))
        file.seek(0)
        if packed is None:
            file.seek(start)
            yield file
            return
        whole = (
            gzip.GzipFile(fileobj=file) if packed == "gzip" else pa.CompressedInputStream(pa.PythonFile(file), packed)
        )
        with whole, io.BufferedReader(whole, 1 << 16) as stream:
            while start:
                skipped = len(stream.read(min(start, 1 << 16)))
                if not skipped:
                    raise EOFError("the file has become shorter")
                start -= skipped
            yield stream


def is_compressed(path: str) -> bool:
    with open(path, "rb") as file:
        return _compression(file.read(4)) is not None


def _compression(head: bytes) -> str | None:
    return "gzip" if head.startswith(_GZIP) else "zstd" if head.startswith(_ZSTD) else None


def digest(path: str) -> str:
    """A digest of a file's bytes (SHA-256 of its pieces' SHA-256), by a few threads at GB/s."""

    def piece(start: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(_PIECE)).digest()

    size = os.path.getsize(path)
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        pieces = pool.map(piece, range(0, size, _PIECE))
        return hashlib.sha256(b"".join([size.to_bytes(8, "little"), *pieces])).hexdigest()


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-sft"
