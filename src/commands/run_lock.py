"""Keeps a second run out of a run's folder, before anything is loaded."""

import errno
import fcntl
import logging
import os
import platform
import time
from pathlib import Path
from typing import TextIO

from src.errors import UserError

log = logging.getLogger(__name__)

LOCK = "fit.lock"
_held: list[TextIO] = []  # open as long as the process lives, since closing one releases its lock


def lock_run(root: str | Path) -> None:
    """Locks `root` for this process; the kernel releases the lock when the process ends, however it does.

    Raises:
        UserError: another process holds it, or its file cannot be written.
    """
    try:
        _lock(Path(root))
    except OSError as error:
        raise UserError(
            f"trainer.default_root_dir {root}: its {LOCK} cannot be written: {error.strerror or error}. "
            "Remove what is there if no fit runs, make room, or give another folder."
        ) from error


def _lock(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    file = open(root / LOCK, "a+")  # noqa: SIM115 - open as long as the process lives
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
            log.warning("%s: it cannot be locked (%s); a second fit there would go unnoticed", file.name, error)
            return
        file.seek(0)
        raise UserError(
            f"trainer.default_root_dir {root}: another fit is training there ({file.read().strip() or 'unknown'}). "
            "Wait until it ends, stop it, or give another folder."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _held.append(file)
