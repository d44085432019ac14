"""config.json of the DeepSeek-V3 architecture: read, and refused by name where the model does not implement it.

Without torch and transformers: whoever plans reads and refuses what whoever trains does.
"""

from pathlib import Path
from types import NoneType
from typing import Any

from src.disk.json_file import read_object
from src.errors import UserError, hub_remedy

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
BOOLEANS = ("norm_topk_prob", "attention_bias", "tie_word_embeddings", "rope_interleave")
OBJECTS = ("rope_scaling", "rope_parameters", "quantization_config", "auto_map")
NO_INTEGERS = ("q_lora_rank", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps")  # of REQUIRED
ROPE_TYPES = ("default", "yarn")
# Least and most of other numbers, null or absent ones being transformers' own unless they are needed.
FLOATS = {
    "routed_scaling_factor": (1e-6, 1e4),
    "rms_norm_eps": (1e-20, 0.1),
    "rope_theta": (1.001, 1e12),
    "initializer_range": (0, 100),
}
YARN = {
    "factor": (1, 1e6),
    "original_max_position_embeddings": (1, 2**28),
    "mscale": (0, 100),
    "mscale_all_dim": (0, 100),
    "attention_factor": (1e-6, 1e4),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
}
YARN_NEEDS = ("factor", "original_max_position_embeddings")
# The most that a field may be: far beyond any model, and below what would take all memory before a weight is compared.
MOST = {name: 2**18 for name in REQUIRED if name not in NO_INTEGERS} | {
    "vocab_size": 2**22,
    "num_hidden_layers": 2**12,
    "n_routed_experts": 2**14,
    "max_position_embeddings": 2**28,
}


def read_fields(directory: str | Path, option: str = "--model.pretrained") -> dict[str, Any]:
    """The fields of the config.json of a Hugging Face directory, which `option` gives.

    Raises:
        ValueError: there is no config.json, it is of another architecture or asks for a feature that the model does
            not implement; all such features are listed with their values.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        remedy = hub_remedy(directory, option) or f"{option} must be a Hugging Face directory of a DeepSeek-V3 model."
        raise UserError(f"{path} does not exist; {remedy}")
    fields = read_object(path)
    check_fields(fields, str(path))
    return fields


def check_fields(fields: dict[str, Any], origin: str) -> None:
    """Raises as `read_fields`; `origin` names the fields in errors."""
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{origin}: model_type is {model_type!r}; the DeepSeek-V3 architecture is trained here, "
            f"model_type {' or '.join(MODEL_TYPES)}."
        )
    absent = [name for name in REQUIRED if name not in fields]
    if absent:
        raise UserError(f"{origin} lacks {', '.join(absent)}; take the config.json that came with the weights.")
    problems = [
        f"{name} is {_short(fields[name])}, which must be an integer"
        for name in REQUIRED
        if name not in NO_INTEGERS and type(fields[name]) is not int
    ]
    problems += _wrong_types(fields)
    if problems:
        raise UserError(f"{origin}: " + "; ".join(problems) + ".")
    problems = [
        f"{name} = {fields[name]!r} (implemented: {' or '.join(map(repr, values))})"
        for name, values in ONLY_VALUES.items()
        if name in fields and (fields[name] not in values or (type(fields[name]) is bool) != (type(values[0]) is bool))
    ]
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        problems.append(f"RoPE type = {rope_type!r} (implemented: {' or '.join(map(repr, ROPE_TYPES))})")
    if scaling.get("truncate") is False:
        problems.append("YaRN truncate = False (implemented: True)")
    method = (fields.get("quantization_config") or {}).get("quant_method", "fp8")
    if method != "fp8":  # Kimi-K2-Thinking's INT4, for one
        problems.append(f"quantization_config.quant_method = {method!r} (implemented: 'fp8')")
    if problems:
        raise UserError(f"{origin} asks for what this model does not implement: " + "; ".join(problems) + ".")
    if problems := _wrong_numbers(fields, scaling, rope_type == "yarn"):
        raise UserError(f"{origin}: " + "; ".join(problems) + ".")
    _check_sizes(fields, origin)


def mtp_loss_weight_of(asked: float | None, has_block: bool, base: str) -> float:
    """The weight where it is given, else 0.1 where `base` has a multi-token-prediction block and 0 where it has none.

    Raises:
        ValueError: a positive weight is given and `base`, named in the error, has no block.
    """
    if asked is None:
        return 0.1 if has_block else 0.0
    if asked > 0 and not has_block:
        raise UserError(
            f"mtp_loss_weight is {asked}, but {base} has no multi-token-prediction block to train: leave it out, or "
            "set --model.mtp_loss_weight 0."
        )
    return asked


def _wrong_types(fields: dict[str, Any]) -> list[str]:
    problems = [
        f"{name} is {_short(fields[name])}, which must be true or false"
        for name in BOOLEANS
        if name in fields and type(fields[name]) is not bool
    ]
    problems += [
        f"{name} is {_short(fields[name])}, which must be an object or null"
        for name in OBJECTS
        if not isinstance(fields.get(name), (dict, NoneType))
    ]
    ends = fields.get("eos_token_id")
    if ends is not None and not all(type(end) is int and end >= 0 for end in (ends if type(ends) is list else [ends])):
        problems.append(f"eos_token_id is {_short(ends)}, which must be a token's number or a list of them")
    return problems


def _wrong_numbers(fields: dict[str, Any], scaling: dict[str, Any], yarn: bool) -> list[str]:
    """Of RoPE, as transformers reads it, and of the other floats."""
    needed = YARN_NEEDS if yarn else ()
    places = [("", fields, name, name in REQUIRED) for name in FLOATS]
    places += [("RoPE's ", scaling, name, name in needed) for name in ("rope_theta", *(YARN if yarn else ()))]
    problems = []
    for whose, given, name, is_needed in places:
        value: Any = given.get(name)
        least, most = (FLOATS | YARN)[name]
        if value is None and not is_needed:
            continue
        whole = name == "original_max_position_embeddings"
        if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
            number = "an integer" if whole else "a number"
            problems.append(f"{whose}{name} is {_short(value)}, which must be {number} from {least:g} to {most:g}")
    return problems


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def _check_sizes(fields: dict[str, Any], origin: str) -> None:
    experts, groups, chosen_groups = fields["n_routed_experts"], fields["n_group"], fields["topk_group"]
    top_k, heads = fields["num_experts_per_tok"], fields["num_attention_heads"]
    problems = [
        f"{name} is {_short(fields[name])}, which must be {least} to {most:,}"
        for name, most in MOST.items()
        if not (least := 0 if name in ("first_k_dense_replace", "n_group", "n_shared_experts") else 1)
        <= fields[name]
        <= most
    ]
    if type(fields["q_lora_rank"]) not in (int, NoneType) or (fields["q_lora_rank"] or 0) > 2**18:
        problems.append(f"q_lora_rank is {fields['q_lora_rank']!r}, which must be null or an integer up to {2**18:,}")
    elif fields["qk_rope_head_dim"] % 2:
        problems.append(f"qk_rope_head_dim {fields['qk_rope_head_dim']} is odd; RoPE turns pairs")
    if problems:
        raise UserError(f"{origin}: " + "; ".join(problems) + ".")
    if fields.get("num_key_value_heads", heads) not in (heads, None):
        problems.append(f"num_key_value_heads {fields['num_key_value_heads']} is not num_attention_heads {heads}")
    if groups < 1 or experts % groups:
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
    if fields["q_lora_rank"] is not None and fields["q_lora_rank"] < 1:
        problems.append(f"q_lora_rank is {fields['q_lora_rank']}; null means no compression of queries")
    if not fields["n_shared_experts"]:
        problems.append(f"n_shared_experts is {fields['n_shared_experts']}; at least one is implemented")
    if problems:
        raise UserError(f"{origin}: " + "; ".join(problems) + ".")
