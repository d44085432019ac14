"""Phases by CUDA events: the device's time, although the host runs ahead; memory and MFU are logged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from src.callbacks.phase_timer import TRAINING
from src.callbacks.throughput import Throughput
from tests.callbacks.stub import STEPS, Stub, train
from tests.callbacks.test_throughput import rows_of

pytestmark = pytest.mark.gpu


class Busy(Stub):
    """A forward that the host hands over at once and the device takes long for."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = torch.ones(4096, 4096, device=self.device)
        for _ in range(200):
            x = x @ x * 0
        return super().training_step(batch, batch_idx) + x.sum()


def test_a_step_adds_up_on_the_device(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    train(Busy(), Throughput(), logger=logger, accelerator="cuda", devices=1)
    rows = [row for row in rows_of(Path(logger.log_dir)) if "train/tokens_per_second" in row]
    assert len(rows) == STEPS
    for row in rows[1:]:
        assert sum(row[f"time/{phase}"] for phase in TRAINING) == pytest.approx(row["train/step_seconds"])
        assert row["time/forward"] > 0.5 * row["train/step_seconds"]
        assert row["memory/reserved_gib"] >= row["memory/peak_gib"] > 3 * 4096**2 * 4 / 2**30 / 2
        assert row["train/mfu"] > 0
