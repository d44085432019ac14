"""Why a save failed, and what to do."""

import errno
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.disk.space import Room

log = logging.getLogger(__name__)

_ROOM = "Make room there, keep fewer checkpoints (checkpoint.keep) or write to another disk (trainer.default_root_dir)."
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: f"A quota is used up. {_ROOM}",
    errno.EFBIG: "Raise the limit of a file's size (`ulimit -f`, or the file system's own).",
}


@dataclass(frozen=True)
class Problem:
    """One rank's problem: what happened, and its errno if it has one."""

    text: str
    errno: int | None

    @classmethod
    def of(cls, rank: int, path: Path, error: Exception) -> "Problem":
        """An error while writing `path`, or the file that the error names."""
        if not isinstance(error, OSError):  # not the disk's fault, so its origin matters
            log.error("rank %d, %s", rank, path, exc_info=error)
            return cls(f"Rank {rank} could not write {path}: {error!r}", None)
        reason = error.strerror or str(error)
        return cls(f"Rank {rank} could not write {error.filename or path}: {reason}", error.errno)


def failure(final: Path, problems: Sequence[Problem], needed: int, room: Room) -> str:
    """The one message on a save to `final` of `needed` bytes that failed."""
    texts = "; ".join(problem.text for problem in problems[:4])
    more = f" and so for {len(problems) - 4} more ranks" if len(problems) > 4 else ""
    remedy = next((_REMEDIES[p.errno] for p in problems if p.errno in _REMEDIES), "Look into that first.")
    return (
        f"{final} was not saved. {texts}{more}. It takes {needed:,} bytes, and {room}. {remedy} "
        "The training's state and earlier checkpoints are untouched, and the next save tries again."
    )
