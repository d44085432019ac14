from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from src.callbacks.loss_spike import LossSpike


def test_a_jump_is_a_spike_and_noise_is_none() -> None:
    spike = LossSpike(deviations=6, memory=20)
    for step in range(60):
        loss = 2.0 - 0.001 * step + (0.02 if step % 2 else -0.02)
        assert not spike.is_spike(loss)
        spike.update(loss)
    assert spike.is_spike(2.5) and not spike.is_spike(2.05)


@pytest.mark.parametrize("seen", [0, 19])
def test_nothing_is_said_before_enough_was_seen(seen: int) -> None:
    spike = LossSpike(memory=20)
    for _ in range(seen):
        spike.update(1.0)
    assert not spike.is_spike(100.0)


class Losses(pl.LightningModule):
    """Logs given losses as the SFT module does, after the callbacks' batch end."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = losses
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight * 0

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        self.log("train/loss", self.losses[batch_idx])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("place", [15, 29])  # in the middle, and the very last step
def test_the_log_names_the_step(place: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    losses = [2.0 + 0.01 * (step % 3) for step in range(30)]
    losses[place] = 5.0
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[LossSpike(memory=10)],
    )
    with caplog.at_level("WARNING"):
        trainer.fit(Losses(losses), torch.utils.data.DataLoader(list(range(30))))  # type: ignore[arg-type]
    (message,) = [r.getMessage() for r in caplog.records if "jumped" in r.getMessage()]
    assert message.startswith(f"step {place + 1}: the loss jumped to 5.0000")
