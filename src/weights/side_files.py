"""A Hugging Face directory's other files: configuration, generation settings, tokenizer, template."""

import copy
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.disk.durable import sync_file
from src.disk.json_file import read_object
from src.errors import UserError
from src.weights.fp8 import QUANTIZATION_CONFIG
from src.weights.hf_writer import write_json

if TYPE_CHECKING:
    from transformers import DeepseekV3Config

log = logging.getLogger(__name__)

_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*",
    "LICENSE*",
)


def copy_side_files(src_dir: str | Path, dst_dir: str | Path, skip: tuple[str, ...] = ()) -> list[str]:
    """Copies the files of a Hugging Face directory that are neither weights nor model code.

    Files are copied as they are: transformers' own `save_pretrained` drops rope_scaling, rope_theta and torch_dtype.

    Args:
        skip: names of files that are left out.

    Returns:
        The paths copied, relative to `dst_dir`, which is made.
    """
    src, dst = Path(src_dir), Path(dst_dir)
    files = sorted(
        {file for pattern in _PATTERNS for file in src.glob(pattern) if file.is_file() and file.name not in skip}
    )
    for file in files:
        target = dst / file.relative_to(src)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        sync_file(target)
    return [str(file.relative_to(src)) for file in files]


def read_config(directory: str | Path) -> dict[str, Any]:
    """The content of config.json. Raises ValueError if there is none."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; it comes with the weights, and training copies it into each checkpoint")
    return read_object(path)


def write_config(directory: Path, config: dict[str, Any], *, dtype: str, mtp_layers: int) -> None:
    """Writes config.json for weights in `dtype` (bf16, fp32, fp8), everything else as it was.

    `torch_dtype` (`dtype` where the base spells it so) is that of the weights, `quantization_config` is there for fp8
    alone, `auto_map` goes, since no model code is written, `num_nextn_predict_layers` is the number of MTP blocks among
    the weights, `model_type` becomes deepseek_v3 where transformers does not know the base's, and `architectures`, by
    which vLLM chooses the model, is added where the base has none.
    """
    written = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    spelled = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    written |= dict.fromkeys(spelled, "float32" if dtype == "fp32" else "bfloat16")
    written["num_nextn_predict_layers"] = mtp_layers
    written.setdefault("architectures", ["DeepseekV3ForCausalLM"])
    if not transformers_knows(config["model_type"]):
        log.info("config.json: model_type deepseek_v3 for %s, which transformers does not know", config["model_type"])
        written["model_type"] = "deepseek_v3"
    if dtype == "fp8":
        written["quantization_config"] = QUANTIZATION_CONFIG
    write_json(directory / "config.json", written)


def transformers_knows(model_type: str) -> bool:
    """Whether AutoModelForCausalLM opens this model_type without code that comes with the weights."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING


def architecture(config: dict[str, Any]) -> "DeepseekV3Config":
    """The content of config.json as transformers' config object, for its shapes."""
    from transformers import DeepseekV3Config  # slow to import, and of no use to those who only copy files

    # What transformers derives, or would take for a request to run code or to quantise.
    ignored = ("model_type", "architectures", "auto_map", "quantization_config", "transformers_version")
    fields = {key: value for key, value in config.items() if key not in ignored}
    return DeepseekV3Config(**copy.deepcopy(fields))  # it adds keys to rope_scaling where it stands
