"""What a run records of itself reaches every checkpoint and every logger."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from src.callbacks.export_at_end import ExportAtEnd
from src.callbacks.run_record import RunRecord, run_record
from src.callbacks.step_checkpoint import step_of
from src.callbacks.weights_checkpoint import WeightsCheckpoint
from src.datamodules import SFTDataModule

FACTS = {"train": {"hash": "abc", "rows": 7, "mixture": {"a.jsonl": {"weight": 2.0}}}, "val": {"hash": "def"}}


class Data(SFTDataModule):
    def __init__(self) -> None:
        super().__init__(["a.jsonl"])

    def prepare_data(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return FACTS

    def train_dataloader(self) -> Any:
        return DataLoader([{"step_tokens": 5}], batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    def state_dict(self) -> dict[str, Any]:
        return {}


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Any, index: int) -> None:
        for name, value in (("val/loss", 1.0), ("val/math/loss", 2.0), ("val/math/accuracy", 0.5)):
            self.log(name, value, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_loggers_and_checkpoint_have_revision_versions_and_the_datas_hash(tmp_path: Path) -> None:
    record = RunRecord("data: {max_length: 64}", str(tmp_path), None)
    loggers = [TensorBoardLogger(tmp_path, "board", "", default_hp_metric=False), CSVLogger(tmp_path, "csv", "")]
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=loggers, enable_checkpointing=False, callbacks=[record],
                      enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1)  # fmt: skip
    trainer.fit(Module(), datamodule=Data())
    for folder in ("board", "csv"):
        logged = yaml.safe_load((tmp_path / folder / "hparams.yaml").read_text())
        assert logged["data"] == FACTS and logged["config"]["data"]["max_length"] == 64
        assert logged["versions"]["torch"] == torch.__version__ and "git_revision" in logged
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    (text,) = events.Tensors("run/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "hash: abc" in shown and f"torch: {torch.__version__}" in shown and "weight: 2.0" in shown
    saved = yaml.safe_load(record.side_files(trainer)["files"]["run.json"])
    assert saved["data"] == FACTS and saved["tokens"] == 5 and saved["base"] == str(tmp_path)
    assert {name: loss["value"] for name, loss in saved["losses"].items()} == {"val/loss": 1.0, "val/math/loss": 2.0}


def test_what_needs_it_says_so() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="ExportAtEnd needs the callback RunRecord"):
        run_record(trainer, ExportAtEnd())
    with pytest.raises(ValueError, match="WeightsCheckpoint needs the callback RunRecord"):
        WeightsCheckpoint(3).setup(trainer, Module(), "fit")


def test_settings_of_weights_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="weights.every_n_train_steps is -1; it must be 0"):
        WeightsCheckpoint(-1)
    with pytest.raises(ValueError, match="weights.keep is 0; at least the newest"):
        WeightsCheckpoint(5, keep=0)
    names = ("step=12", "step=12.partial", "step=x", "step=3.ckpt")
    assert [step_of(Path(name), suffix="") for name in names] == [12, -1, -1, -1]
