"""The multi-token-prediction block from a published directory through training into an export, trained or carried."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from src.callbacks.run_record import RunRecord
from src.callbacks.step_checkpoint import StepCheckpoint
from src.commands.export import export
from tests.models.tiny import DEEPSEEK_V3, hf_state_dict, mtp_oracle, needs_mtp_oracle, oracle

from .spawn import run_distributed
from .training import Layout, Recipe, fit, save_model

BLOCK = f"model.layers.{DEEPSEEK_V3['num_hidden_layers']}."
COPIES = {
    f"{BLOCK}embed_tokens.weight": "model.embed_tokens.weight",
    f"{BLOCK}shared_head.head.weight": "lm_head.weight",
}


def fit_and_save(recipe: Recipe, directory: str, root: str) -> dict[str, Any]:
    callbacks = (StepCheckpoint(every_n_train_steps=0), RunRecord("", directory, None))
    return fit(Layout(dp=1, sp=2, accumulation=2, batch_size=2), recipe, directory, 30, root, more_callbacks=callbacks)


@needs_mtp_oracle
@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_the_block_reaches_the_export(weight: float, tmp_path: Path) -> None:
    main = oracle(DEEPSEEK_V3)
    published = hf_state_dict(main, mtp_oracle(main))
    directory = save_model(main, DEEPSEEK_V3, tmp_path / "model", mtp_oracle(main))
    recipe = Recipe(mtp_loss_weight=weight, steps=2)
    trained = run_distributed(fit_and_save, 2, recipe, directory, str(tmp_path / "run"))[0]["weights"]
    export(str(tmp_path / "run/checkpoints/last.ckpt"), str(tmp_path / "out"), "fp32")

    written = load_file(tmp_path / "out/model.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 1
    assert written.keys() == published.keys() | COPIES.keys()
    for copy, original in COPIES.items():
        assert torch.equal(written[copy], trained[original]) and torch.equal(written[original], trained[original])
    for name in (name for name in published if name.startswith(BLOCK)):
        unchanged = torch.equal(written[name], published[name])
        if weight == 0:  # not built: carried over from where training started
            assert unchanged, name
        elif name in trained:
            assert torch.equal(written[name], trained[name]) and not unchanged, name
        else:
            assert ".mlp.experts." in name
