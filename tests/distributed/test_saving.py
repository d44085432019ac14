"""Checkpoints written beside training: as DeepSpeed's own, whole after a kill, apart from training when they fail."""

import logging
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from src.callbacks.step_checkpoint import LAST, StepCheckpoint, step_of
from src.checkpoints.host_copy import nbytes, tensors
from src.checkpoints.manifest import MANIFEST, check_manifest
from src.checkpoints.saving import SaveFailed
from src.disk.durable import CheckedFile
from src.models.sft_module import Batch, SFTModule
from tests.checkpoints.equality import differences

from .spawn import run_distributed, server
from .training import Layout, Recipe, fit

TWO = Layout(dp=2, sp=1, accumulation=2, batch_size=1)
ONE = Layout(dp=1, sp=1, accumulation=1, batch_size=1)
RECIPE = Recipe(mtp_loss_weight=0.0)
DOCUMENTS = 60


class ThreeWays(pl.Callback):
    """Saves step 2 by DeepSpeed's own engine, in the foreground, and beside training, held back till that has ended."""

    def __init__(self, root: str) -> None:
        self.root, self.gate, self.saved = Path(root), threading.Event(), False

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != 2 or self.saved:
            return
        self.saved = True
        strategy: Any = trainer.strategy
        engine, ours = strategy.deepspeed_engine, strategy.deepspeed_engine.checkpoint_engine
        engine.checkpoint_engine = TorchCheckpointEngine()
        engine.checkpoint_engine.zipfile_serialization = True
        engine.save_checkpoint(str(self.root / "plain"), tag="checkpoint")
        engine.checkpoint_engine = ours
        trainer.save_checkpoint(self.root / "foreground")
        entered = CheckedFile.__enter__

        def held(file: CheckedFile) -> CheckedFile:
            self.gate.wait()
            return entered(file)

        CheckedFile.__enter__ = held  # type: ignore[method-assign,assignment]
        trainer.save_checkpoint(self.root / "background", storage_options={"asynchronous": True})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert not (self.root / "background").exists()
        self.gate.set()
        trainer.strategy.wait_for_checkpoint()  # type: ignore[attr-defined]


def save_three_ways(layout: Layout, directory: str, root: str) -> list[float]:
    return list(fit(layout, RECIPE, directory, DOCUMENTS, more_callbacks=(ThreeWays(root),))["losses"])


def elements(state: Any) -> int:
    """Bytes of a state's tensors, each once, without what lies around them in their storages."""
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors(state)}.values())


@pytest.mark.parametrize(
    "layout",
    [
        TWO,
        Layout(dp=2, sp=1, accumulation=2, batch_size=1, stage=1),
        Layout(dp=1, sp=2, accumulation=2, batch_size=2, precision="bf16-true", stage=1),
        Layout(dp=2, sp=1, accumulation=2, batch_size=1, offload_optimizer=True, offload_parameters=True),
        Layout(dp=2, sp=1, accumulation=2, batch_size=1, stage=0),
    ],
    ids=str,
)
def test_in_the_background_as_in_the_foreground_as_by_deepspeed(layout: Layout, directory: str, tmp_path: Path) -> None:
    run_distributed(save_three_ways, 2, layout, directory, str(tmp_path))
    files = sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain/checkpoint").iterdir())
    assert len(files) == {0: 1, 1: 3, 3: 4}[layout.stage]
    for way in ("foreground", "background"):
        folder = tmp_path / way
        check_manifest(folder)
        kept = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        assert kept == sorted([*files, Path("latest"), Path(MANIFEST)])
        for file in files:
            plain, ours = (torch.load(f / file, weights_only=False) for f in (tmp_path / "plain", folder))
            # Lightning's and our own entries come on top of DeepSpeed's.
            ours = {key: value for key, value in ours.items() if key in plain}
            assert not differences(plain, ours)
            assert nbytes(ours) <= nbytes(plain) and (way == "foreground" or nbytes(ours) == elements(ours))


class SmallDisk(pl.Callback):
    """On rank 1 the system lets no file grow beyond 10 kB while the checkpoints of some steps are written."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps
        self.errors: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: self.errors.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("src.checkpoints").addHandler(handler)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # before StepCheckpoint's
        if trainer.global_rank == 1 and trainer.global_step in self.steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1:
            trainer.strategy._saver._join()  # type: ignore[attr-defined]
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def fit_on_a_small_disk(
    directory: str, root: str, asynchronous: bool, steps: tuple[int, ...]
) -> tuple[list[float], list[str], str]:
    disk, checkpoints = SmallDisk(steps), StepCheckpoint(1, keep=2, async_save=asynchronous)
    try:
        result = fit(TWO, RECIPE, directory, DOCUMENTS, root, more_callbacks=(disk, checkpoints))
    except SaveFailed as error:
        return [], disk.errors, str(error)
    return result["losses"], disk.errors, ""


@pytest.fixture(scope="module")
def undisturbed(directory: str) -> list[float]:
    return list(run_distributed(fit, 2, TWO, RECIPE, directory, DOCUMENTS)[0]["losses"])


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_costs_its_checkpoints_and_no_training(
    asynchronous: bool, undisturbed: list[float], directory: str, tmp_path: Path
) -> None:
    results = run_distributed(fit_on_a_small_disk, 2, directory, str(tmp_path), asynchronous, (2, 3))
    for losses, _, failure in results:
        assert losses == undisturbed and not failure
    errors = results[0][1]
    assert len(errors) == 2 and "step=2.ckpt was not saved. Rank 1 could not write" in errors[0]
    assert "File too large" in errors[0] and "`ulimit -f`" in errors[0] and "step=3.ckpt" in errors[1]
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [LAST, "step=4.ckpt", "step=5.ckpt"]
    check_manifest(folder / LAST)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_fit_fails_where_its_last_checkpoint_does(asynchronous: bool, directory: str, tmp_path: Path) -> None:
    results = run_distributed(fit_on_a_small_disk, 2, directory, str(tmp_path), asynchronous, (4, 5))
    for _, _, failure in results:
        assert "step=5.ckpt was not saved" in failure and "earlier checkpoints are untouched" in failure
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [LAST, "step=2.ckpt", "step=3.ckpt"]
    check_manifest(folder / LAST)


class Breaks(SFTModule):
    """Breaks down in the fourth step, while the checkpoint of the third is written."""

    error: type[BaseException] = FloatingPointError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 3:
            raise self.error("broken")
        return super().training_step(batch, batch_idx)


class Interrupted(Breaks):
    error = KeyboardInterrupt


def slow_down() -> None:
    write = CheckedFile.write

    def slowly(self: CheckedFile, data: bytes | memoryview) -> int:
        time.sleep(0.001)
        return write(self, data)

    CheckedFile.write = slowly  # type: ignore[method-assign]


def fit_that_breaks(directory: str, root: str, module_class: type[SFTModule]) -> str:
    slow_down()
    try:
        fit(TWO, RECIPE, directory, DOCUMENTS, root, module_class, (StepCheckpoint(3),))
    except (FloatingPointError, SystemExit) as error:
        return type(error).__name__
    return ""


@pytest.mark.parametrize(("module_class", "ends"), [(Breaks, "FloatingPointError"), (Interrupted, "SystemExit")])
def test_what_is_being_written_when_training_breaks_is_finished(
    module_class: type[SFTModule], ends: str, directory: str, tmp_path: Path
) -> None:
    assert run_distributed(fit_that_breaks, 2, directory, str(tmp_path), module_class) == [ends, ends]
    assert os.readlink(tmp_path / "checkpoints" / LAST) == "step=3.ckpt"
    check_manifest(tmp_path / "checkpoints" / LAST)


def resume(directory: str, root: str, port: int) -> None:
    from .spawn import _entry

    slow_down()
    last = Path(root) / "checkpoints" / LAST
    checkpoint = str(last.resolve()) if last.exists() else None
    arguments = (ONE, Recipe(mtp_loss_weight=0.0, steps=8), directory, DOCUMENTS, root, SFTModule, (StepCheckpoint(1),))
    _entry(0, fit, 1, port, root, (*arguments, checkpoint))


def test_a_run_killed_while_it_saves_goes_on_to_the_same_weights(directory: str, tmp_path: Path) -> None:
    from .spawn import free_port

    context, folder = server(), tmp_path / "checkpoints"
    for reached, pause in ((2, 0.05), (4, 0.1), (6, 0.15)):
        process = context.Process(target=resume, args=(directory, str(tmp_path), free_port()))
        process.start()
        while max(map(step_of, folder.glob("step=*.ckpt")), default=0) < reached:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(pause)
        process.kill()
        process.join()
        check_manifest((folder / LAST).resolve(strict=True))
    process = context.Process(target=resume, args=(directory, str(tmp_path), free_port()))
    process.start()
    process.join()
    assert sorted(p.name for p in folder.iterdir()) == [LAST, "step=7.ckpt", "step=8.ckpt"]
    ended = torch.load(tmp_path / "0.pt", weights_only=False)["weights"]
    recipe = Recipe(mtp_loss_weight=0.0, steps=8)
    whole = run_distributed(fit, 1, ONE, recipe, directory, DOCUMENTS)[0]["weights"]
    assert not differences(ended, whole)
