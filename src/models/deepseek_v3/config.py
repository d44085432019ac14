"""Read a config.json of the DeepSeek-V3 architecture, and refuse by name what the model does not implement."""

import json
from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config

# Kimi-K2 is DeepSeek-V3 under its own name.
MODEL_TYPES = ("deepseek_v3", "kimi_k2")

# Fields whose other values transformers accepts and silently ignores: training on them would be training another model.
ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
    "attention_dropout": (0, None),
    "rope_interleave": (True,),
    "pretraining_tp": (1,),
    "num_nextn_predict_layers": (0, 1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "index_topk": (None,),  # sparse attention of later models
}
# What decides the model; transformers would put DeepSeek-V3's own numbers where one is absent.
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "max_position_embeddings",
    "rms_norm_eps",
)
ROPE_TYPES = ("default", "yarn")


def load_config(directory: str | Path) -> DeepseekV3Config:
    """The config of a Hugging Face directory.

    Raises:
        ValueError: there is no config.json, it is of another architecture, or it asks for a feature that the model
            does not implement; all such features are listed with their values.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; a Hugging Face directory of a DeepSeek-V3 model is needed here "
            "(give it with --model.pretrained)."
        )
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    return config_from_dict(fields, str(path))


def config_from_dict(fields: dict[str, Any], origin: str = "config.json") -> DeepseekV3Config:
    """A DeepseekV3Config of config.json's fields; `origin` names them in errors. Raises as `load_config`."""
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{origin}: model_type is {model_type!r}; the DeepSeek-V3 architecture is trained here, "
            f"model_type {' or '.join(MODEL_TYPES)}."
        )
    absent = [name for name in REQUIRED if name not in fields]
    if absent:
        raise ValueError(f"{origin} lacks {', '.join(absent)}; take the config.json that came with the weights.")
    problems = [
        f"{name} = {fields[name]!r} (implemented: {' or '.join(map(repr, values))})"
        for name, values in ONLY_VALUES.items()
        if name in fields and fields[name] not in values
    ]
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        problems.append(f"RoPE type = {rope_type!r} (implemented: {' or '.join(map(repr, ROPE_TYPES))})")
    if scaling.get("truncate") is False:
        problems.append("YaRN truncate = False (implemented: True)")
    if problems:
        raise ValueError(f"{origin} asks for what this model does not implement: " + "; ".join(problems) + ".")

    # The names that transformers derives or that remote code needs are left out of what it validates.
    ignored = ("model_type", "auto_map", "quantization_config", "architectures", "transformers_version")
    config = DeepseekV3Config(**{name: value for name, value in fields.items() if name not in ignored})
    # transformers reads an absent field as one MTP block; a checkpoint that does not name it has none.
    config.num_nextn_predict_layers = fields.get("num_nextn_predict_layers") or 0
    _check_sizes(config, origin)
    return config


def _check_sizes(config: DeepseekV3Config, origin: str) -> None:
    experts, groups, chosen_groups = config.n_routed_experts, config.n_group, config.topk_group
    top_k, heads = config.num_experts_per_tok, config.num_attention_heads
    problems = []
    if config.num_key_value_heads != heads:
        problems.append(f"num_key_value_heads {config.num_key_value_heads} is not num_attention_heads {heads}")
    if experts % groups:
        problems.append(f"n_routed_experts {experts} is not a multiple of n_group {groups}")
    elif experts // groups < 2:
        problems.append(f"n_routed_experts {experts} / n_group {groups} leaves fewer than two experts a group")
    elif not 1 <= chosen_groups <= groups:
        problems.append(f"topk_group {chosen_groups} is not between 1 and n_group {groups}")
    elif top_k > chosen_groups * (experts // groups):
        problems.append(
            f"num_experts_per_tok {top_k} is more than the {chosen_groups * (experts // groups)} experts of "
            f"topk_group {chosen_groups} groups"
        )
    if config.q_lora_rank is not None and config.q_lora_rank < 1:
        problems.append(f"q_lora_rank is {config.q_lora_rank}; null means no compression of queries")
    if not config.n_shared_experts:
        problems.append(f"n_shared_experts is {config.n_shared_experts}; at least one is implemented")
    if problems:
        raise ValueError(f"{origin}: " + "; ".join(problems) + ".")
