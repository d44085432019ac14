"""Every subset of the model that can be named can be trained, and has the gradients that it has in the whole."""

from fnmatch import fnmatch
from typing import Any

import pytest
import torch

from tests.models.tiny import DEEPSEEK_V3, hf_state_dict, oracle

from .spawn import run_distributed
from .training import Layout, Recipe, fit

TRAINED = {
    "routed experts": "*.mlp.experts.*",
    "one layer's experts": "model.layers.1.mlp.experts.*",
    "two of its experts": "model.layers.1.mlp.experts.[23].*",
    "routers": "*.mlp.gate.weight",
    "shared experts": "*.shared_experts.*",
    "dense MLP": "model.layers.0.mlp.*",
    "attention": "*.self_attn.*",
    "norms": "*norm.weight",
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
}


def train(layout: Layout, directory: str, names: list[str]) -> dict[str, Any]:
    """Gradients of the first step by what is trained; an error's text where it fails."""
    found: dict[str, Any] = {}
    for what, pattern in {"everything": "*", **TRAINED}.items():
        frozen = tuple(name for name in names if not fnmatch(name, pattern))
        try:
            recipe = Recipe(freeze=frozen, steps=1, gradient_clip_val=0.0)
            found[what] = fit(layout, recipe, directory, 8)["gradients"]
        except Exception as error:
            found[what] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("stage", [1, 3])
def test_every_subset_trains_with_the_wholes_gradients(stage: int, checkpointing: bool, directory: str) -> None:
    names = [name for name in hf_state_dict(oracle(DEEPSEEK_V3)) if not name.endswith("e_score_correction_bias")]
    layout = Layout(1, 1, 1, 4, stage=stage, activation_checkpointing=checkpointing)
    found = run_distributed(train, 1, layout, directory, names)[0]
    failed = {what: gradients for what, gradients in found.items() if isinstance(gradients, str)}
    assert not failed
    for what, gradients in found.items():
        assert gradients
        for name, gradient in gradients.items():
            assert gradient.abs().sum() > 0, (what, name)
            whole = found["everything"][name]
            expected = whole[2:4] if what == "two of its experts" else whole
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)
