"""What config.json may ask for, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from src.errors import UserError
from src.models.deepseek_v3 import DeepseekV3ForCausalLM, config_from_dict, load_config
from src.models.deepseek_v3.config_json import OBJECTS, REQUIRED, YARN_NEEDS, check_fields
from src.models.deepseek_v3.config_json import YARN as YARN_NUMBERS
from tests.command import ROOT

from .tiny import DEEPSEEK_V3, KIMI_K2, YARN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; the DeepSeek-V3 architecture is trained here"),
        ({"scoring_func": "softmax"}, r"scoring_func = 'softmax' \(implemented: 'sigmoid'\)"),
        ({"topk_method": "greedy", "hidden_act": "gelu"}, "topk_method = 'greedy'.*hidden_act = 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE type = 'linear'"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers = 2"),
        ({"n_group": 3}, "n_routed_experts 8 is not a multiple of n_group 3"),
        ({"n_group": 8, "topk_group": 4}, "fewer than two experts a group"),
        ({"topk_group": 5}, "topk_group 5 is not between 1 and n_group 4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than the 4 experts of topk_group 2"),
        ({"sliding_window": 128, "index_topk": 5}, "sliding_window = 128.*index_topk = 5"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0; null means no compression"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2 is not num_attention_heads 4"),
        ({"hidden_size": "64", "n_group": 2.0}, "hidden_size is '64', which must be an integer; n_group is 2.0"),
        ({"n_group": 0}, "n_routed_experts 8 is not a multiple of n_group 0"),
        ({"num_nextn_predict_layers": True}, "num_nextn_predict_layers = True"),
        ({"moe_layer_freq": True, "attention_dropout": False}, "moe_layer_freq = True.*attention_dropout = False"),
        ({"rope_scaling": YARN | {"rope_type": ["yarn"]}}, r"RoPE type = \['yarn'\]"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(DEEPSEEK_V3 | change)


@pytest.mark.parametrize("name", [name for name in REQUIRED if name != "norm_topk_prob"])
@pytest.mark.parametrize("value", [0, -1, 10**9, float("nan"), float("inf"), "7", None, [], True])
def test_absurd_values_are_named_before_any_memory_is_taken(name: str, value: Any) -> None:
    allowed = {"first_k_dense_replace": (0,), "q_lora_rank": (None,)}
    if value in allowed.get(name, ()) and type(value) is not bool:
        return
    with pytest.raises(ValueError, match=rf"^config.json: .*{name}"):
        check_fields(DEEPSEEK_V3 | {name: value}, "config.json")


NO_NUMBERS: list[Any] = [float("nan"), float("inf"), "7", [], {}, True, -1, 10**400]
NO_BOOLEANS: list[Any] = ["no", float("nan"), 1, None, []]
NO_TOKENS: list[Any] = ["1", 1.0, True, [1, "2"], {}, -1]
OF_WRONG_TYPES = [
    *[(name, value) for name in OBJECTS for value in ("yarn", "fp8", ["yarn"], 7, True)],
    *[(name, value) for name in ("norm_topk_prob", "attention_bias") for value in NO_BOOLEANS],
    *[("eos_token_id", value) for value in NO_TOKENS],
    *[("rope_theta", value) for value in [*NO_NUMBERS, 0, 1]],
    ("routed_scaling_factor", 10**400),
    ("rms_norm_eps", 1e30),
]


@pytest.mark.parametrize(("name", "value"), OF_WRONG_TYPES)
def test_values_of_other_types_are_named(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^config.json: .*{name} is .*which must be") as error:
        check_fields(DEEPSEEK_V3 | {name: value}, "config.json")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in YARN_NUMBERS for value in NO_NUMBERS],
        *[(name, None) for name in YARN_NEEDS],
        *[("factor", 0), ("factor", 0.5), ("original_max_position_embeddings", 0)],
        *[("original_max_position_embeddings", 4096.0), ("beta_fast", 0), ("rope_theta", 1)],
    ],
)
def test_rope_has_numbers_that_it_can_work_with(form: str, name: str, value: Any) -> None:
    fields = {name: value for name, value in DEEPSEEK_V3.items() if name != "rope_scaling"}
    check_fields(fields | {form: YARN | {"rope_theta": 5e4}}, "config.json")
    with pytest.raises(UserError, match=f"RoPE's {name} is"):
        check_fields(fields | {form: YARN | {name: value}}, "config.json")
    if name in YARN_NEEDS:
        with pytest.raises(UserError, match=f"RoPE's {name} is None"):
            check_fields(fields | {form: {key: YARN[key] for key in YARN if key != name}}, "config.json")


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3-slim", "demo", "moonlight-16b", "small", "tiny"])
def test_published_values_pass_as_they_are_and_as_transformers_writes_them(name: str) -> None:
    config = load_config(ROOT / "configs/models" / name)
    written = config.to_dict()
    assert "rope_scaling" not in written and "rope_theta" in written["rope_parameters"]
    assert config_from_dict(written | {"eos_token_id": [1, 2]}).rope_parameters == config.rope_parameters


def test_what_decides_the_model_must_be_there() -> None:
    fields = {name: value for name, value in DEEPSEEK_V3.items() if name not in ("hidden_size", "n_group")}
    with pytest.raises(ValueError, match="lacks hidden_size, n_group; take the config.json that came with"):
        config_from_dict(fields)


@pytest.mark.parametrize("size", [-2, 0, 3])
def test_shards_that_do_not_divide_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"experts_per_shard {size} does not divide the 8 experts"):
        DeepseekV3ForCausalLM(config_from_dict(DEEPSEEK_V3), size)


def test_kimi_k2_is_the_same_architecture_under_another_name() -> None:
    assert config_from_dict(KIMI_K2).n_routed_experts == 12


def test_an_absent_mtp_field_means_none() -> None:
    fields = {name: value for name, value in DEEPSEEK_V3.items() if name != "num_nextn_predict_layers"}
    assert config_from_dict(fields).num_nextn_predict_layers == 0


def test_absent_heads_of_keys_and_values_are_the_querys() -> None:
    fields = {name: value for name, value in DEEPSEEK_V3.items() if name != "num_key_value_heads"}
    assert config_from_dict(fields).num_key_value_heads == DEEPSEEK_V3["num_attention_heads"]


def test_a_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json does not exist; .*--model.pretrained"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3)[:-5])
    with pytest.raises(ValueError, match="not valid JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json is not a JSON object"):
        load_config(tmp_path)
