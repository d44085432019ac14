"""Loggers: their steps count from 1, they take text and pictures, and a full disk costs curves instead of the run."""

import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from typing_extensions import override

from src.disk.space import Room, try_to_write

log = logging.getLogger(__name__)

# What Lightning and this project call of a logger, if it has it.
WRITES = (
    *("log_metrics", "log_hyperparams", "log_graph", "log_image", "log_text"),
    *("after_save_checkpoint", "save", "finalize"),
)


@contextmanager
def spare_the_run(path: Path, logger: Logger | None = None) -> Generator[None, None, None]:
    """Logs a disk error while `path` is written, instead of ending on one rank a run that trains.

    logger: that writes; a `RunLogger` reports the error itself, once.
    """
    try:
        yield
    except Exception as error:
        if (cause := _of_the_disk(error)) is None:
            raise
        if isinstance(logger, RunLogger):
            logger.lose_writer(cause)
        else:
            log.error("%s, training goes on", _not_written(path, cause))


def _of_the_disk(error: Exception) -> OSError | None:
    cause = error.__cause__ or error  # Lightning makes every error of a writer a ValueError
    return cause if isinstance(cause, OSError) else None


def _not_written(path: Path, error: OSError) -> str:
    return f"{path} was not written: {error.strerror or error}, {Room.at(path)}; make room there"


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger that survives a full disk.

    After one disk error TensorBoard's writer raises it in every later call. So we drop the writer and open another,
    with its own file, as soon as there is room. Values logged meanwhile are lost. Each of the two is reported once.
    """

    _lost = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        threading.excepthook = _quiet_about_writers(threading.excepthook)

    @property
    @override
    def experiment(self) -> Any:
        if not self._lost:
            return super().experiment
        try_to_write(self._folder)
        experiment = super().experiment
        self._lost = False
        log.warning("%s: TensorBoard events are written again", self._folder)
        return experiment

    @property
    def _folder(self) -> Path:
        return Path(self.log_dir)

    def lose_writer(self, error: OSError) -> None:
        """Drops the writer after a disk error."""
        if not self._lost:
            log.error(
                "%s; until then there are no TensorBoard events, and training goes on",
                _not_written(self._folder, error),
            )
        self._lost, self._experiment = True, None

    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with spare_the_run(self._folder, self):
            super().log_metrics(metrics, step)

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        with spare_the_run(self._folder, self):
            super().log_hyperparams(*args, **kwargs)

    @override
    def save(self) -> None:
        with spare_the_run(self._folder, self):
            super().save()

    @override
    def finalize(self, status: str) -> None:
        with spare_the_run(self._folder, self):
            super().finalize(status)


def outlive_full_disks(logger: Logger) -> None:
    """Lets any other logger lose values while the disk is full; reports it once until a write succeeds."""
    failing = set[str]()  # by method, since some only buffer what another one writes

    def spared(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            try:
                result = call(*args, **kwargs)
            except Exception as error:
                if (cause := _of_the_disk(error)) is None:
                    raise
                if not failing:
                    folder = _not_written(Path(logger.save_dir or "."), cause)
                    log.error("%s: %s, and training goes on", type(logger).__name__, folder)
                failing.add(name)
                return None
            failing.discard(name)
            return result

        return write

    for name in WRITES:
        if hasattr(logger, name):
            setattr(logger, name, spared(name, getattr(logger, name)))


def count_steps_from_one(trainer: pl.Trainer) -> None:
    """Makes loggers number a value by its optimizer step, as the progress bar and the checkpoints' names do.

    The first step is 1; a validation has the number of the step after which it ran. Lightning, and those of its
    callbacks that write to loggers themselves, number a step by the steps before it, and its validation likewise.
    """

    def numbered(log_metrics: Callable[..., Any]) -> Callable[..., Any]:
        def log_by_step(metrics: Any, step: int | None = None) -> Any:
            if trainer.state.fn == "fit" and step == trainer.fit_loop.epoch_loop._batches_that_stepped:
                step = trainer.global_step if trainer.validating else step + 1
            return log_metrics(metrics, step)

        return log_by_step

    for logger in trainer.loggers:
        logger.log_metrics = numbered(logger.log_metrics)  # type: ignore[method-assign]


def _quiet_about_writers(hook: Any) -> Any:
    """`hook`, silent for TensorBoard's writer threads, whose errors their callers get too."""

    def quiet(args: Any) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            hook(args)

    return quiet


def log_image(trainer: pl.Trainer, name: str, image: Any, step: int) -> None:
    """Sends an image, uint8 [height, width, 3], to TensorBoard and to loggers with `log_image`, such as WandbLogger."""
    for logger in trainer.loggers:
        with spare_the_run(Path(logger.save_dir or "."), logger):
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, image, step, dataformats="HWC")
            elif hasattr(logger, "log_image"):
                logger.log_image(key=name, images=[image], step=step)


def log_texts(trainer: pl.Trainer, name: str, texts: dict[str, str], step: int) -> None:
    """Sends texts, by the prompts that they answer, to TensorBoard and, as a table, to loggers with `log_text`."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for index, (prompt, text) in enumerate(texts.items()):
                # Four spaces make it a code block in Markdown.
                shown = "\n".join(f"    {line}" for line in [prompt, "---", *text.splitlines()])
                with spare_the_run(Path(logger.log_dir), logger):
                    logger.experiment.add_text(f"{name}/{index}", shown, step)
        elif hasattr(logger, "log_text"):
            rows = [[str(step), prompt, text] for prompt, text in texts.items()]
            with spare_the_run(Path(logger.save_dir or "."), logger):
                logger.log_text(key=name, columns=["step", "prompt", "text"], data=rows, step=step)
