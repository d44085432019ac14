"""A callback with a bug."""

import lightning.pytorch as pl


class Broken(pl.Callback):
    """Raises what a mistake of ours would, when it is made or when it is set up."""

    def __init__(self, when: str) -> None:
        self.when = when
        if when == "made":
            raise ValueError("a bug")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        raise ValueError("a bug")
