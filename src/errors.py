"""What is the user's to put right, told apart from what is ours: `src/cli.py` prints it as one line, without a
traceback. JSON files, which are mostly theirs, and full disks become such errors here."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast


class UserError(ValueError):
    """A value, file or directory of the user's that cannot be worked with: which, why not, and what would do."""


def read_object(file: Path, remedy: str = "; copy it again") -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        UserError: it is missing or no regular file, cannot be read, is not valid JSON, or holds something else.
    """
    if not file.is_file():
        raise UserError(f"{file} is {'no regular file' if file.exists() else 'missing'}{remedy}")
    try:
        fields = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}{remedy}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is no JSON object but {str(fields)[:40]!r}{remedy}")
    return fields


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
        while cause is not None and not reason:  # of another process there is but the text of its error
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


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """1 row, 1,200 rows."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
