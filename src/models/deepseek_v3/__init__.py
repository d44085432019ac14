"""DeepSeek-V3, exact: mathematics alone, ignorant of ranks, DeepSpeed and files.

The names below are imported on first use: `config_json`, `sizes` and `flops` need no torch, and are read without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from src.models.deepseek_v3.sp_group import SequenceParallelGroup, SingleProcess

    from .config import config_from_dict, load_config
    from .expert_parallel import ExpertParallelGroup
    from .experts import Experts, ExpertShard
    from .model import DeepseekV3ForCausalLM, Losses, LossWeights

_HOMES = {
    "DeepseekV3ForCausalLM": "model",
    "ExpertParallelGroup": "expert_parallel",
    "ExpertShard": "experts",
    "Experts": "experts",
    "LossWeights": "model",
    "Losses": "model",
    "SequenceParallelGroup": "sp_group",
    "SingleProcess": "sp_group",
    "config_from_dict": "config",
    "load_config": "config",
}

__all__ = [
    "DeepseekV3ForCausalLM",
    "ExpertParallelGroup",
    "ExpertShard",
    "Experts",
    "LossWeights",
    "Losses",
    "SequenceParallelGroup",
    "SingleProcess",
    "config_from_dict",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
