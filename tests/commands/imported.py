"""A callback that tells what has been imported by the first step."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Imported(pl.Callback):
    """Writes the names of all modules to `file`."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_start(self, *_: Any) -> None:
        Path(self.file).write_text("\n".join(sys.modules))
