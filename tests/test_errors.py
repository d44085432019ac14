"""A Hub model's name in a directory's place: who reads it says how to download the model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from src.checkpoints.manifest import check_manifest
from src.commands.checks import check_weights
from src.datamodules.tokenizer import load_tokenizer
from src.models.deepseek_v3 import load_config
from src.models.deepseek_v3.sizes import read_sizes

NAME = "deepseek-ai/DeepSeek-V3.1"
DOWNLOAD = rf"`hf download {NAME} --local-dir DeepSeek-V3.1`, and give that directory: {{}} DeepSeek-V3.1$"


@pytest.mark.parametrize(
    ("read", "option"),
    [
        (load_config, "--model.pretrained"),  # fit from scratch, check-data
        (partial(read_sizes, experts_per_shard=None, mtp=False), "--model.pretrained"),  # plan
        (check_weights, "--model.pretrained"),  # fit
        (partial(load_config, option="--model"), "--model"),  # verify
        (load_tokenizer, "--data.tokenizer"),
    ],
)
def test_a_hub_models_name(read: Callable[[str], Any], option: str) -> None:
    with pytest.raises(ValueError, match=DOWNLOAD.format(option)):
        read(NAME)
    with pytest.raises(ValueError) as refused:
        read("/nowhere/model")
    assert "hf download" not in str(refused.value)


def test_a_checkpoint_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="there is no checkpoint /nowhere/last.ckpt; give a directory such as runs/"):
        check_manifest("/nowhere/last.ckpt")
