"""Text and pictures to the loggers that show them. A full disk costs curves, not the run."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

log = logging.getLogger(__name__)


@contextmanager
def spare_the_run(what: str) -> Generator[None, None, None]:
    """An error of the disk is logged: it would be one rank's alone, and end a run that trains."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # Lightning makes every error of a writer a ValueError
        if not isinstance(cause, OSError):
            raise
        log.error("%s not written, training goes on: %s", what, cause)


class RunLogger(TensorBoardLogger):
    """TensorBoard's, whose writer hands a full disk's error to the next call."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with spare_the_run("TensorBoard's curves were"):
            super().log_metrics(metrics, step)

    def save(self) -> None:
        with spare_the_run("TensorBoard's file was"):
            super().save()

    def finalize(self, status: str) -> None:
        with spare_the_run("TensorBoard's file was"):
            super().finalize(status)


def log_image(trainer: pl.Trainer, name: str, image: Any, step: int) -> None:
    """image: uint8 [height, width, 3]. TensorBoard, and loggers with `log_image`, Weights & Biases and Neptune say."""
    for logger in trainer.loggers:
        with spare_the_run(f"the picture {name} was"):
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
                with spare_the_run(f"the text {name} was"):
                    logger.experiment.add_text(f"{name}/{index}", shown, step)
        elif hasattr(logger, "log_text"):
            rows = [[str(step), prompt, text] for prompt, text in texts.items()]
            logger.log_text(key=name, columns=["step", "prompt", "text"], data=rows, step=step)
