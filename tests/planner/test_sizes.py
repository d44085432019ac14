"""Names and elements of the parameters against the model itself, built on the meta device."""

import json
from pathlib import Path

import pytest
import torch

from src.models.deepseek_v3 import DeepseekV3ForCausalLM, load_config
from src.models.deepseek_v3.experts import auto_experts_per_shard
from src.models.deepseek_v3.flops import layer_weights
from src.planner.plan import config_of
from src.planner.sizes import named_parameters, read_sizes, sizes_of, trained_part
from tests.planner.settings import MODEL, sizes


@pytest.mark.parametrize(("directory", "mtp"), [("configs/models/tiny", True), ("configs/models/tiny", False)])
@pytest.mark.parametrize("query", [True, False])
def test_names_and_elements_are_the_models(tmp_path: Path, directory: str, mtp: bool, query: bool) -> None:
    fields = json.loads((Path(directory) / "config.json").read_text())
    fields |= {"num_nextn_predict_layers": 1} | ({} if query else {"q_lora_rank": None})
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(load_config(tmp_path), None, mtp)
    planned = read_sizes(tmp_path, None, mtp)
    assert dict(named_parameters(planned)) == {name: p.numel() for name, p in model.named_parameters()}
    assert planned.parameters == sum(p.numel() for p in model.parameters())


def test_deepseek_v3_has_671e9_parameters_and_a_block_of_11_6e9() -> None:
    assert sizes().parameters == 671_026_404_352  # and 58 x 256 elements of the routers' bias, which is a buffer
    assert sizes(mtp=True).parameters - sizes().parameters == pytest.approx(11.6e9, rel=2e-3)


@pytest.mark.parametrize("experts", [256, 64, 32, 8, 12, 7])
def test_experts_per_shard_is_chosen_as_the_model_does(experts: int) -> None:
    fields = json.loads((Path(MODEL) / "config.json").read_text()) | {"n_routed_experts": experts}
    assert sizes_of(fields, None, False).experts_per_shard == auto_experts_per_shard(experts)


def test_the_formulas_for_operations_read_our_numbers() -> None:
    config = load_config(MODEL)
    for dense in (True, False):
        assert layer_weights(config_of(sizes()), dense) == layer_weights(config, dense)


def test_what_is_frozen_is_not_counted() -> None:
    s = sizes()
    assert trained_part(s, []) == 1
    frozen = trained_part(s, ["model.embed_tokens*", "model.layers.*.mlp.experts.*"])
    experts = 58 * 256 * 3 * 7168 * 2048
    assert frozen == pytest.approx(1 - (s.embedding + experts) / s.parameters)


def test_a_shard_that_does_not_divide_the_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="experts_per_shard 24 does not divide the 256"):
        read_sizes(MODEL, 24, False)
    with pytest.raises(ValueError, match="does not exist"):
        read_sizes("configs/models", None, False)
