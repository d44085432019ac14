"""Text and pictures reach the loggers that show them, and no callback needs TensorBoard."""

import errno
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.callbacks.expert_load import ExpertLoad
from src.callbacks.loggers import WRITES, RunLogger, log_image, log_texts, outlive_full_disks
from src.callbacks.throughput import Throughput
from tests.disk.full import full_disk

from .stub import ACCUMULATION, STEPS, Stub, train
from .test_expert_load import Stub as Experts
from .test_expert_load import train as train_experts


class Fake(Logger):
    """What Weights & Biases' logger offers, with the same signatures."""

    name, version = "fake", 0

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, Any, int]] = []
        self.texts: list[tuple[str, Any, Any, int]] = []
        self.metrics: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.metrics.setdefault(step, {}).update(metrics)

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        assert step is not None
        self.images.append((key, images, step))

    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int | None = None) -> None:
        assert step is not None
        self.texts.append((key, columns, data, step))


def test_expert_load_with_another_logger() -> None:
    logger = Fake()
    train_experts(Experts(), ExpertLoad(heat_map_every_n_steps=2), logger)
    assert [(key, step) for key, _, step in logger.images] == [("expert_load/heat_map", 1), ("expert_load/heat_map", 3)]
    assert all(image.dtype == np.uint8 and image.ndim == 3 for _, (image,), _ in logger.images)
    assert logger.metrics[2]["expert_load/max_over_mean_worst"] == 4


class Logs(pl.Callback):
    """Logs the optimizer step under way or just done wherever a user's callback may."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        module.log("batch_start", trainer.global_step + 1.0)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.log("epoch_end", float(trainer.global_step))

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.log("validation", float(trainer.global_step))

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"own": trainer.global_step}, trainer.global_step)


class Save(pl.Callback):
    """Saves in the middle of training, as StepCheckpoint does."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2 and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "step=2.ckpt")


def test_loggers_count_a_runs_steps_as_its_progress_does(tmp_path: Path) -> None:
    """One session, and two of which the second resumes: each value stands at its own step, and none is there twice."""
    resumed: list[dict[str, Any]] = [{"max_steps": 2}, {"ckpt_path": f"{tmp_path}/2/step=2.ckpt"}]
    whole: list[dict[str, Any]] = [{}]
    for sessions in (whole, resumed):
        root = tmp_path / str(len(sessions))
        other = Fake()
        for settings in sessions:
            board = RunLogger(root, name="tensorboard", version="", default_hp_metric=False)
            callbacks = [Logs(), Save(), Throughput(), LearningRateMonitor("step"), DeviceStatsMonitor()]
            settings |= {"logger": [board, other], "default_root_dir": root, "val_check_interval": ACCUMULATION}
            train(Stub(), *callbacks, validate=True, **settings)
        events = EventAccumulator(board.log_dir, {"scalars": 0}).Reload()
        every = list(range(1, STEPS + 1))
        for name in ("train/loss", "batch_start", "validation", "own"):
            assert [(event.step, event.value) for event in events.Scalars(name)] == [(n, n) for n in every], name
            assert [other.metrics[n][name] for n in every] == every, name
        for name in ("train/step_seconds", "val/loss", "lr-SGD"):
            assert sorted({event.step for event in events.Scalars(name)}) == every, name
        assert {event.step for event in events.Scalars("epoch_end")} <= {2, STEPS}
        assert all(event.step == event.value for event in events.Scalars("epoch_end"))
        assert sorted(other.metrics) == every  # DeviceStatsMonitor's too


def test_text_goes_where_it_is_shown(tmp_path: Path) -> None:
    tensorboard, fake = TensorBoardLogger(tmp_path), Fake()
    trainer: Any = SimpleNamespace(loggers=[tensorboard, CSVLogger(tmp_path), fake])
    log_texts(trainer, "samples", {"Hi": "Hello\n# there", "Why?": ""}, 7)
    log_image(trainer, "picture", np.zeros((2, 3, 3), dtype=np.uint8), 7)
    assert fake.texts == [
        ("samples", ["step", "prompt", "text"], [["7", "Hi", "Hello\n# there"], ["7", "Why?", ""]], 7)
    ]
    tensorboard.experiment.flush()
    events = EventAccumulator(tensorboard.log_dir).Reload()
    (event,) = events.Tensors("samples/0/text_summary")
    assert event.step == 7 and event.tensor_proto.string_val == [b"    Hi\n    ---\n    Hello\n    # there"]
    assert events.Tags()["images"] == ["picture"]


@pytest.mark.parametrize("method", ["log_text", "log_image"])
def test_the_fake_is_like_the_real_one(method: str) -> None:
    import inspect

    ours, real = (list(inspect.signature(getattr(c, method)).parameters) for c in (Fake, WandbLogger))
    assert set(ours) <= set(real)


def test_a_disk_that_is_full_for_seconds_costs_its_curves_alone_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = RunLogger(tmp_path, name="tensorboard", version="", default_hp_metric=False)
    trainer: Any = SimpleNamespace(loggers=[logger])

    def steps(numbers: range) -> None:
        for step in numbers:
            logger.log_metrics({f"train/{n}": 1.0 for n in range(20)}, step)
            log_texts(trainer, "samples", {"Hi": "Hello"}, step)
            log_image(trainer, "picture", np.zeros((2, 3, 3), dtype=np.uint8), step)
            logger.save()

    steps(range(5))
    with full_disk():
        steps(range(5, 15))
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    said = rf"{tmp_path}/tensorboard was not written: File too large, [\d,]+ bytes are free in .*; make room there; "
    assert re.search(said, caplog.text)
    steps(range(15, 20))
    logger.finalize("success")
    assert [r.levelname for r in caplog.records] == ["ERROR", "WARNING"] and "events are written again" in caplog.text
    assert "Traceback" not in capfd.readouterr().err
    events = EventAccumulator(logger.log_dir, {"images": 0}).Reload()
    for name in ("train/0", "train/19"):
        assert {event.step for event in events.Scalars(name)} >= {*range(5), *range(15, 20)}
    assert {event.step for event in events.Images("picture")} >= {*range(15, 20)}


def test_a_run_that_begins_and_ends_on_a_full_disk_says_it_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = RunLogger(tmp_path, name="tensorboard", version="", default_hp_metric=False)
    with full_disk():
        logger.log_hyperparams({"config": "x" * 4000})
        for step in range(9):
            logger.log_metrics({f"train/{n}": 1.0 for n in range(20)}, step)
        logger.save()
        logger.finalize("success")
    assert [r.levelname for r in caplog.records] == ["ERROR"]


def test_another_error_of_a_logger_is_not_hidden(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, name="tensorboard", version="")
    with pytest.raises(ValueError, match="not supported"):
        logger.log_metrics({"train/loss": object()}, 1)


def test_a_full_disk_ends_no_run_with_a_logger_of_the_users(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(tmp_path, name="csv", version="")
    outlive_full_disks(logger)

    def steps(numbers: range) -> None:
        for step in numbers:
            logger.log_metrics({f"train/{n}": 1.0 for n in range(200)}, step)
            logger.save()

    with full_disk():
        steps(range(5))
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert re.search(rf"CSVLogger: {tmp_path}.* was not written: File too large, [\d,]+ bytes are free", caplog.text)
    steps(range(5, 7))
    logger.finalize("success")
    assert (Path(logger.log_dir) / "metrics.csv").read_text().count("\n") > 2


class Full(Fake):
    """As W&B's on a full disk."""

    def full(self, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log_metrics = log_hyperparams = log_graph = log_image = log_text = after_save_checkpoint = save = finalize = full


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_full_disk_ends_no_run_in_a_sample(wrapped: bool, caplog: pytest.LogCaptureFixture) -> None:
    logger = Full()
    trainer: Any = SimpleNamespace(loggers=[logger])
    if wrapped:
        outlive_full_disks(logger)
        for name in WRITES:
            getattr(logger, name)()
    for step in range(2):
        log_texts(trainer, "samples", {"Hi": "Hello"}, step)
        log_image(trainer, "picture", np.zeros((2, 3, 3), dtype=np.uint8), step)
    assert [r.levelname for r in caplog.records] == ["ERROR"] * (1 if wrapped else 4)
    assert "was not written: No space left on device" in caplog.text


@pytest.mark.parametrize("wrapped", [True, False])
def test_another_error_in_a_sample_is_not_hidden(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise TypeError("columns")

    logger = Fake()
    monkeypatch.setattr(logger, "log_text", wrong)
    if wrapped:
        outlive_full_disks(logger)
    with pytest.raises(TypeError):
        log_texts(SimpleNamespace(loggers=[logger]), "samples", {"Hi": "Hello"}, 1)  # type: ignore[arg-type]
