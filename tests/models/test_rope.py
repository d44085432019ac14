"""The rotary frequencies are transformers', to the bit."""

import json
from pathlib import Path

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from src.models.deepseek_v3 import config_from_dict
from src.models.deepseek_v3.rope import inverse_frequencies

MODELS = {path.parent.name: json.loads(path.read_text()) for path in Path("configs/models").glob("*/config.json")}
YARN = MODELS["deepseek-v3"]["rope_scaling"]


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_theta": 50000.0},
        {"rope_scaling": YARN | {"factor": 3.7, "beta_fast": 20, "beta_slow": 2}},
        {"qk_rope_head_dim": 48},
    ],
    ids=["published", "theta", "yarn", "width"],
)
def test_frequencies_are_transformers(name: str, change: dict[str, object]) -> None:
    config = config_from_dict(MODELS[name] | change)
    theirs = DeepseekV3RotaryEmbedding(config)
    frequencies, factor = inverse_frequencies(config)
    assert torch.equal(frequencies, theirs.inv_freq) and factor == theirs.attention_scaling
