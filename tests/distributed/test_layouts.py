"""The same tokens weigh the same on any layout: losses, gradients and weights equal plain PyTorch with transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import DEEPSEEK_V3, oracle, relative

from .spawn import run_distributed
from .training import Layout, Recipe, fit, plain_pytorch, save_model

ROWS_PER_STEP = 4
DOCUMENTS = 60  # 18 rows: the fifth step gets two, and is filled up with empty ones
RECIPE = Recipe()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    model = oracle(DEEPSEEK_V3)
    directory = save_model(model, DEEPSEEK_V3, tmp_path_factory.mktemp("model"))
    return directory, plain_pytorch(model, RECIPE, DOCUMENTS, ROWS_PER_STEP)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=1, sp=1, accumulation=2, batch_size=2),
        Layout(dp=2, sp=1, accumulation=1, batch_size=2),
        Layout(dp=1, sp=2, accumulation=4, batch_size=1),
        Layout(dp=1, sp=4, accumulation=1, batch_size=4),
        Layout(dp=2, sp=2, accumulation=2, batch_size=1),
        Layout(dp=4, sp=1, accumulation=1, batch_size=1),
        Layout(dp=1, sp=2, accumulation=2, batch_size=2, stage=1),
        Layout(dp=2, sp=1, accumulation=2, batch_size=1, stage=2),
        Layout(dp=1, sp=2, accumulation=2, batch_size=2, offload_optimizer=True, offload_parameters=True),
    ],
    ids=str,
)
def test_every_layout_is_the_same_training(layout: Layout, reference: tuple[str, dict[str, Any]]) -> None:
    directory, expected = reference
    for result in run_distributed(fit, layout.world_size, layout, RECIPE, directory, DOCUMENTS):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for kind in ("gradients", "weights"):
            assert result[kind].keys() == expected[kind].keys()
            for name, tensor in expected[kind].items():
                assert relative(result[kind][name], tensor) < 1e-5, (kind, name)


def test_sizes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    directory = save_model(oracle(DEEPSEEK_V3), DEEPSEEK_V3, tmp_path)
    three = Layout(dp=1, sp=3, accumulation=1, batch_size=1)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="num_attention_heads 4 is not a multiple"):
        run_distributed(fit, 3, three, RECIPE, directory, DOCUMENTS)
