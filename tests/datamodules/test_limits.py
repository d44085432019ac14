"""What the trainer may take of the data: Lightning's own loops are the oracle."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from src.datamodules.limits import Limits, check_training, check_validation
from src.errors import UserError

BATCHES = 8


class Nothing(pl.LightningModule):
    def training_step(self, batch: torch.Tensor) -> None: ...

    def validation_step(self, batch: torch.Tensor) -> None: ...

    def configure_optimizers(self) -> None: ...


def check(trainer: pl.Trainer) -> None:
    limits = Limits.of(trainer)
    check_training(2 * BATCHES - 1, 2, 1, 1, limits)
    check_validation("val", 2 * BATCHES - 1, 2, 1, limits.limit_val_batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"val_check_interval": 9},
            "trainer.val_check_interval is 9, but an epoch has 8 micro-batches: lower it, to 8",
        ),
        ({"val_check_interval": 3, "limit_train_batches": 2}, "val_check_interval is 3, but an epoch has 2 micro-"),
        ({"val_check_interval": 5, "limit_train_batches": 0.5}, "val_check_interval is 5, but an epoch has 4 micro-"),
        (
            {"limit_train_batches": 0.1},
            "trainer.limit_train_batches is 0.1, less than one of the 8 micro-batches of an",
        ),
        ({"limit_val_batches": 0.1}, "trainer.limit_val_batches is 0.1, less than one of the 8 micro-batches of val:"),
        ({"val_check_interval": 8}, ""),
        ({"val_check_interval": 9, "check_val_every_n_epoch": None}, ""),
        ({"val_check_interval": 9, "limit_val_batches": 0.0}, ""),
        ({"val_check_interval": 9, "limit_train_batches": 0.001, "fast_dev_run": 2}, ""),
        ({"val_check_interval": 0.001, "limit_train_batches": 0.125, "limit_val_batches": 0.125}, ""),
        ({"val_check_interval": "00:01:00:00", "limit_val_batches": 100}, ""),
    ],
)
def test_what_the_trainer_refuses_once_all_is_loaded_is_refused_before(options: dict[str, Any], message: str) -> None:
    quiet: dict[str, Any] = {
        name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    }
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, **quiet, **options)
    loader = DataLoader(TensorDataset(torch.arange(BATCHES)))
    if not message:
        check(trainer)
        trainer.fit(Nothing(), loader, loader)
        return
    with pytest.raises(UserError, match=message):
        check(trainer)
    with pytest.raises((ValueError, MisconfigurationException)):
        trainer.fit(Nothing(), loader, loader)


def test_a_limit_counts_whole_optimizer_steps() -> None:
    check_training(9, 1, 1, 4, Limits(val_check_interval=12))  # empty rows fill the third step
    for limit in (3, 0.5):
        with pytest.raises(UserError, match=rf"limit_train_batches {limit} .* after \d, in the middle of an optimizer"):
            check_training(9, 1, 1, 4, Limits(limit))
