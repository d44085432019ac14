"""Errors that the user can put right: `src/cli.py` prints them as one line, without a traceback."""

import re
from pathlib import Path


class UserError(ValueError):
    """A value, file or directory of the user's that cannot be used: which, why, and the remedy."""


def hub_remedy(directory: str | Path, option: str) -> str | None:
    """What to do about a directory, given by `option`, that is not here but may be a Hugging Face Hub model's name."""
    name = str(directory)
    if Path(directory).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return None
    local = name.partition("/")[2]
    return (
        f"if {name} is a model of the Hugging Face Hub, download it, `hf download {name} --local-dir {local}`, "
        f"and give that directory: {option} {local}"
    )
