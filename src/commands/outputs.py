"""Finds out, before a command starts, whether its output file can be written, by trying; errors while it is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.disk.space import named_if_full, try_to_write
from src.errors import UserError

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")  # of matplotlib
TRACES = (".json", ".json.gz")  # of torch.profiler


def check_output(option: str, path: str | None, suffixes: tuple[str, ...] = ()) -> None:
    """Opens the file if it is there, else writes another in its folder. None: no file.

    Raises:
        UserError: it cannot be written, or has none of the suffixes.
    """
    if path is None:
        return
    try:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))  # a FIFO that nobody reads is an error
        except FileNotFoundError:
            try_to_write(Path(os.path.realpath(path)).parent)
    except OSError as error:
        raise _not_written(option, path, error) from error
    if suffixes and not path.lower().endswith(suffixes):
        raise UserError(f"{option} {path} has another suffix; use one of {', '.join(suffixes)}.")


@contextmanager
def writes(option: str, path: str) -> Iterator[None]:
    """Around what writes the file. Raises UserError in place of an OSError."""
    try:
        with named_if_full(Path(path), option):
            yield
    except OSError as error:
        raise _not_written(option, path, error) from error


def _not_written(option: str, path: str, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(
        f"{option} {path} cannot be written: {reason}. Give a file in a folder that is there and writable."
    )
