"""transformers' DeepseekV3Config of a config.json that the model implements."""

import copy
from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config

from .config_json import check_fields, read_fields

# The names that transformers derives or that remote code needs are left out of what it validates.
IGNORED = ("model_type", "auto_map", "quantization_config", "architectures", "transformers_version")


def load_config(directory: str | Path, option: str = "--model.pretrained") -> DeepseekV3Config:
    """The config of a Hugging Face directory, which `option` gives. Raises as `read_fields`."""
    return _config(read_fields(directory, option))


def config_from_dict(fields: dict[str, Any], origin: str = "config.json") -> DeepseekV3Config:
    """A DeepseekV3Config of config.json's fields; `origin` names them in errors. Raises as `read_fields`."""
    check_fields(fields, origin)
    return _config(fields)


def _config(fields: dict[str, Any]) -> DeepseekV3Config:
    kept = {name: value for name, value in fields.items() if name not in IGNORED}
    config = DeepseekV3Config(**copy.deepcopy(kept))  # it adds keys to rope_scaling where it stands
    # What transformers would fill in: one MTP block, and DeepSeek-V3's number of heads for keys and values.
    config.num_nextn_predict_layers = fields.get("num_nextn_predict_layers") or 0
    config.num_key_value_heads = config.num_attention_heads
    return config
