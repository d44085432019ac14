"""Weights alone between checkpoints: what the checkpoint of that step exports; without room no training is lost."""

import logging
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from transformers import AutoModelForCausalLM

from src.callbacks.export_at_end import ExportAtEnd
from src.callbacks.run_record import RunRecord
from src.callbacks.step_checkpoint import StepCheckpoint
from src.callbacks.weights_checkpoint import WeightsCheckpoint
from src.commands.export import export
from src.disk import space

from .spawn import run_distributed
from .training import Layout, Recipe, fit

LAYOUT = Layout(dp=1, sp=2, accumulation=2, batch_size=1, precision="bf16-true")
RECIPE = Recipe(mtp_loss_weight=0.0, steps=4)
DOCUMENTS = 60


class SmallDisk(pl.Callback):
    """On rank 1 the disk has 1,000 bytes left from some step on."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.errors: list[str] = []
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: self.errors.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("src").addHandler(handler)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # before the others'
        if trainer.global_rank == 1 and trainer.global_step == self.step:
            usage: Any = type("Usage", (), {"free": 1000})
            space.shutil.disk_usage = lambda path: usage


def train(directory: str, root: str, out: str | None, full_from: int, checkpoint: str | None) -> Any:
    disk = SmallDisk(full_from)
    callbacks = (
        disk,
        RunRecord("model: {from_scratch: false}", directory, None),
        WeightsCheckpoint(every_n_train_steps=2, keep=2),
        *((StepCheckpoint(2, keep=9),) if full_from > 4 else ()),
        ExportAtEnd(out),
    )
    try:
        result = fit(LAYOUT, RECIPE, directory, DOCUMENTS, root, more_callbacks=callbacks, checkpoint=checkpoint)
    except (ValueError, RuntimeError) as error:
        return str(error), disk.errors
    return result["losses"], disk.errors


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_they_are_what_the_checkpoint_of_the_step_exports(directory: str, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    (folder / "step=9.partial").mkdir(parents=True)  # of a session that was killed
    (folder / "step=1").mkdir()  # the oldest of the three that there will be
    for _, errors in run_distributed(train, 2, directory, str(tmp_path), None, 99, None):
        assert not errors
    assert sorted(p.name for p in folder.iterdir()) == ["step=2", "step=4"]
    for step in (2, 4):
        export(f"{tmp_path}/checkpoints/step={step}.ckpt", f"{tmp_path}/{step}")
        found, expected = files(folder / f"step={step}"), files(tmp_path / f"{step}")
        assert found.keys() == expected.keys() and "README.md" in found
        assert [name for name in found if name != "README.md" and found[name] != expected[name]] == []
    model, info = AutoModelForCausalLM.from_pretrained(folder / "step=4", dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not any(info[key] for key in ("missing_keys", "unexpected_keys"))

    # Resumed where a checkpoint is: step 2's stay as they are, and 4's, which come again, are written anew.
    (folder / "step=4/model.safetensors").write_text("of a run that had other settings from here on")
    shutil.rmtree(tmp_path / "checkpoints/step=4.ckpt")
    before = (folder / "step=2/model.safetensors").stat().st_mtime_ns
    resumed = f"{tmp_path}/checkpoints/step=2.ckpt"
    run_distributed(train, 2, directory, str(tmp_path), None, 99, resumed)
    assert files(folder / "step=4")["model.safetensors"] == expected["model.safetensors"]
    assert (folder / "step=2/model.safetensors").stat().st_mtime_ns == before


def test_without_room_training_goes_on_and_the_export_at_the_end_fails(directory: str, tmp_path: Path) -> None:
    """One rank's node alone has none; every rank hears of it, and nothing is begun."""
    (losses, errors), _ = run_distributed(train, 2, directory, str(tmp_path / "b"), None, 3, None)
    assert len(losses) == 4
    assert len(errors) == 1 and "step=4 was not saved; training continues" in errors[0]
    assert "the export to step=4 takes " in errors[0] and "and only 1,000 bytes are free in" in errors[0]
    assert [p.name for p in (tmp_path / "b/weights").iterdir()] == ["step=2"]
    results = run_distributed(train, 2, directory, str(tmp_path / "c"), str(tmp_path / "out"), 3, None)
    assert "rank 1 failed while the weights were exported" in results[0][0]
    assert "the export to out takes " in results[1][0] and "Make room there" in results[1][0]
    assert not (tmp_path / "out").exists()
