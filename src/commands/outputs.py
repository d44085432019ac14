"""Checks, before a command starts, that its output file can be written."""

import os
from pathlib import Path

from src.errors import UserError

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")  # of matplotlib


def check_output(option: str, path: str | None, suffixes: tuple[str, ...] = ()) -> None:
    """Raises ValueError if the file's folder or suffix does not allow writing it. None: no file."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise UserError(f"{option} {path} cannot be written; give a file in a folder that is there and writable.")
    if suffixes and Path(path).suffix.lower() not in suffixes:
        raise UserError(f"{option} {path} has no picture suffix; use one of {', '.join(suffixes)}.")
