"""What TensorBoard gets of the experts' load: values by hand, one point an optimizer step, the heat map."""

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.callbacks.expert_load import CELL, ExpertLoad, heat_map, scalars
from src.callbacks.loggers import count_steps_from_one

# Of each optimizer step, two MoE layers of four experts: even, two of four, all on one, uneven.
LOADS = torch.tensor([[[5, 5, 5, 5], [10, 10, 0, 0]], [[0, 8, 0, 0], [1, 1, 2, 4]], [[3, 3, 3, 3], [3, 3, 3, 3]]])
MAX_OVER_MEAN = [[1.0, 2.0], [4.0, 2.0], [1.0, 1.0]]
# -(1/8 log 1/8 + 1/8 log 1/8 + 1/4 log 1/4 + 1/2 log 1/2) = 7/4 log 2, over log 4
ENTROPY = [[1.0, 0.5], [0.0, 0.875], [1.0, 1.0]]
ACCUMULATION = 2


class Stub(pl.LightningModule):
    """Sets `expert_load` where the real module does, in optimizer_step, and notes after which batch what is logged."""

    def __init__(self, moe: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(first_k_dense_replace=3)
        self.expert_load: torch.Tensor | None = None
        self.moe = moe
        self.linear = torch.nn.Linear(1, 1)
        self.logged_at: list[int] = []
        self.batch = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batch = batch_idx
        return self.linear(batch[0]).sum()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        if self.moe:
            self.expert_load = LOADS[step]

    def log(self, *args: Any, **kwargs: Any) -> None:
        self.logged_at.append(self.batch)
        super().log(*args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(module: Stub, callback: ExpertLoad, logger: Logger) -> None:
    data = torch.utils.data.TensorDataset(torch.ones(ACCUMULATION * len(LOADS), 1))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATION,
        callbacks=[callback],
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    count_steps_from_one(trainer)
    trainer.fit(module, torch.utils.data.DataLoader(data))


def events(logger: TensorBoardLogger) -> EventAccumulator:
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0}).Reload()


def values(found: EventAccumulator, name: str) -> list[float]:
    return [event.value for event in found.Scalars(f"expert_load/{name}")]


def test_values_are_those_by_hand_once_an_optimizer_step(tmp_path: Path) -> None:
    module, logger = Stub(), TensorBoardLogger(tmp_path)
    train(module, ExpertLoad(), logger)
    found = events(logger)
    for name, expected, worst in (("max_over_mean", MAX_OVER_MEAN, max), ("entropy", ENTROPY, min)):
        for layer in (0, 1):  # the first MoE layer stands after three dense ones
            wanted = [step[layer] for step in expected]
            assert values(found, f"{name}/layer_{3 + layer:02d}") == pytest.approx(wanted)
        assert values(found, name) == pytest.approx([sum(step) / 2 for step in expected])
        assert values(found, f"{name}_worst") == pytest.approx([worst(step) for step in expected])
    names = {name for name in found.Tags()["scalars"] if name.startswith("expert_load/")}
    assert len(names) == 2 * (2 + len(LOADS[0]))
    # Nothing in mid-accumulation, where expert_load still holds the step before.
    assert set(module.logged_at) == {1, 3, 5}


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3]), (2, [1, 3]), (50, [1])])
def test_heat_maps_stand_at_the_steps_of_their_scalars(tmp_path: Path, every: int, steps: list[int]) -> None:
    logger = TensorBoardLogger(tmp_path)
    train(Stub(), ExpertLoad(heat_map_every_n_steps=every), logger)
    found = events(logger)
    assert [event.step for event in found.Scalars("expert_load/entropy")] == [1, 2, 3]
    assert found.Tags()["images"] == (["expert_load/heat_map"] if steps else [])
    images = found.Images("expert_load/heat_map") if steps else []
    assert [image.step for image in images] == steps
    for image in images:
        layers, experts = LOADS[image.step - 1].shape
        assert (image.height, image.width) == (layers * CELL, experts * CELL)
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        np.testing.assert_array_equal(pixels, heat_map(LOADS[image.step - 1].double().numpy()))


def test_colours_are_of_the_load_over_the_layers_mean() -> None:
    picture = heat_map(np.array([[0.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 20.0]]))
    assert picture.shape == (2 * CELL, 4 * CELL, 3) and picture.dtype == np.uint8
    blue, white, red = (33, 102, 172), (255, 255, 255), (178, 24, 43)
    for row, colours in enumerate([(blue, white, red, white), (blue, blue, blue, red)]):
        for column, colour in enumerate(colours):
            cell = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            assert (cell == colour).all()


def test_the_most_uneven_load_of_top_k() -> None:
    """Two of eight experts get every token: four times the mean, entropy log 2 / log 8."""
    found = scalars(np.array([[7.0, 0, 0, 0, 0, 0, 7, 0]]), first_layer=61)
    assert found["expert_load/max_over_mean/layer_61"] == 4
    assert found["expert_load/entropy/layer_61"] == pytest.approx(math.log(2) / math.log(8))


def test_the_load_of_ranks_that_share_the_experts() -> None:
    found = scalars(np.array([[9.0, 0, 0, 3], [2, 2, 4, 0]]), first_layer=3, ranks=2)
    assert found["expert_load/ranks_max_over_mean/layer_03"] == 9 / 6
    assert found["expert_load/ranks_max_over_mean/layer_04"] == 1
    assert found["expert_load/ranks_max_over_mean"] == 1.25 and found["expert_load/ranks_max_over_mean_worst"] == 1.5
    assert not any("ranks" in name for name in scalars(LOADS[0].double().numpy(), first_layer=3))


def test_other_loggers_get_scalars_alone(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    train(Stub(), ExpertLoad(heat_map_every_n_steps=1), logger)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "expert_load/entropy/layer_04" in header


def test_a_model_without_moe_layers_logs_nothing(tmp_path: Path) -> None:
    module = Stub(moe=False)
    train(module, ExpertLoad(), TensorBoardLogger(tmp_path))
    assert module.logged_at == []


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"heat_map_every_n_steps is -1; it must be 0 \(never\) or more"):
        ExpertLoad(heat_map_every_n_steps=-1)
