"""Where a run leaves what it saves; read by `plan` too, without Lightning."""

from pathlib import Path


def checkpoint_folder(root: str | Path) -> Path:
    return Path(root) / "checkpoints"


def weights_folder(root: str | Path) -> Path:
    return Path(root) / "weights"
