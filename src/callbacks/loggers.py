"""Text and pictures to the loggers that show them; every logger shows scalars."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger


def log_image(trainer: pl.Trainer, name: str, image: Any, step: int) -> None:
    """image: uint8 [height, width, 3]. TensorBoard, and loggers with `log_image`, Weights & Biases and Neptune say."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, image, step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[image], step=step)


def log_texts(trainer: pl.Trainer, name: str, texts: dict[str, str], step: int) -> None:
    """texts: by what they answer. TensorBoard, and loggers with `log_text`, Weights & Biases say, as a table."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for index, (prompt, text) in enumerate(texts.items()):
                # Four spaces: Markdown shows it as it is.
                shown = "\n".join(f"    {line}" for line in [prompt, "---", *text.splitlines()])
                logger.experiment.add_text(f"{name}/{index}", shown, step)
        elif hasattr(logger, "log_text"):
            rows = [[str(step), prompt, text] for prompt, text in texts.items()]
            logger.log_text(key=name, columns=["step", "prompt", "text"], data=rows, step=step)
