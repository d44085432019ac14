"""Names and elements of the parameters against the model itself, built on the meta device; and what reads them."""

import json
from pathlib import Path

import pytest
import torch

from src.models.deepseek_v3 import DeepseekV3ForCausalLM, load_config
from src.models.deepseek_v3.flops import layer_weights
from src.models.deepseek_v3.freezing import frozen, published_names
from src.models.deepseek_v3.sizes import auto_experts_per_shard, named_parameters, read_sizes, trained_part
from tests.planner.settings import MODEL, sizes

TINY = json.loads(Path("configs/models/tiny/config.json").read_text())


@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize(
    "change", [{}, {"q_lora_rank": None}, {"attention_bias": True}, {"first_k_dense_replace": 9}], ids=str
)
def test_names_and_elements_are_the_models(tmp_path: Path, mtp: bool, change: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_nextn_predict_layers": 1} | change))
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(load_config(tmp_path), None, mtp)
    planned = read_sizes(tmp_path, None, mtp)
    assert dict(named_parameters(planned)) == {name: p.numel() for name, p in model.named_parameters()}
    assert planned.parameters == sum(p.numel() for p in model.parameters())


def test_what_may_wait_for_a_recomputation_is_the_models_own_width() -> None:
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(load_config(MODEL)).bfloat16()
    assert model.kept_bytes == {"attention_output": 47_616, "layer_input": 14_336}  # 46.5 and 14 KiB
    assert model.float().kept_bytes == {"attention_output": 94_720, "layer_input": 28_672}


def test_deepseek_v3_has_671e9_parameters_and_a_block_of_11_6e9() -> None:
    assert sizes().parameters == 671_026_404_352  # and 58 x 256 elements of the routers' bias, which is a buffer
    assert sizes(mtp=True).parameters - sizes().parameters == pytest.approx(11.6e9, rel=2e-3)


@pytest.mark.parametrize(
    ("experts", "hidden", "width", "size"),
    [(256, 7168, 2048, 32), (64, 2048, 1408, 64), (384, 7168, 2048, 32), (7, 7168, 65536, 1), (12, 7168, 20480, 3)],
    ids=["DeepSeek-V3", "Moonlight", "Kimi-K2", "one above the limit", "12 experts of 0.9 GB"],
)
def test_a_shard_is_the_most_experts_that_3_gb_hold(experts: int, hidden: int, width: int, size: int) -> None:
    assert auto_experts_per_shard(experts, hidden, width) == size


def test_the_formulas_for_operations_read_our_numbers() -> None:
    config = load_config(MODEL)
    assert layer_weights(sizes(), dense=True) == layer_weights(config, dense=True) == 583_467_008
    assert layer_weights(sizes(), dense=False) == layer_weights(config, dense=False) == 585_302_016


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


SHARD = ["model.layers.3.mlp.experts.1.gate_up_proj", "model.layers.3.mlp.experts.1.down_proj"]
NAMES = ["model.embed_tokens.weight", "model.layers.3.mlp.gate.weight", *SHARD]


def test_experts_are_frozen_by_their_published_numbers() -> None:
    assert published_names(SHARD[1], 2) == [f"model.layers.3.mlp.experts.{j}.down_proj.weight" for j in (2, 3)]
    assert frozen(NAMES, ["*.experts.*"], 2) == set(SHARD)
    assert frozen(NAMES, ["*.experts.2.*", "*.experts.3.*"], 2) == set(SHARD)
    assert frozen(NAMES, ["*.experts.[23].down_proj.weight", "*embed*"], 2) == {SHARD[1], NAMES[0]}
    assert frozen(NAMES, ["*.experts.1.*"], 1) == set(SHARD)
    assert frozen(NAMES, [], 2) == set()


@pytest.mark.parametrize("pattern", ["*.experts.2.*", "*.experts.?.up_proj.weight"])
def test_a_pattern_that_splits_a_shard_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="which are trained as one tensor \\(2 experts per shard\\): name them all"):
        frozen(NAMES, [pattern], 2)


@pytest.mark.parametrize("pattern", ["*.experts.0.*", "*.experts.1.gate_up_proj", "embed"])
def test_a_pattern_that_names_nothing_published_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="no parameter's name matches"):
        frozen(NAMES, [pattern], 2)
