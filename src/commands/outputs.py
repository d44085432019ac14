"""Files that a command is asked to write at its end, looked at before it begins."""

import os
from pathlib import Path

from src.errors import UserError

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")  # of matplotlib


def check_output(option: str, path: str | None, suffixes: tuple[str, ...] = ()) -> None:
    """Raises ValueError where the file cannot be written: its folder, or its suffix. None is no file."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise UserError(f"{option} {path} cannot be written; give a file in a folder that is there and writable.")
    if suffixes and Path(path).suffix.lower() not in suffixes:
        raise UserError(f"{option} {path} has no picture suffix; use one of {', '.join(suffixes)}.")
