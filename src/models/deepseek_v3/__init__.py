"""DeepSeek-V3, exact: mathematics alone, ignorant of ranks, DeepSpeed and files."""

from .config import config_from_dict, load_config
from .experts import ExpertShard
from .model import DeepseekV3ForCausalLM, Losses, LossWeights
from .recompute import recompute
from .sequence_parallel import SequenceParallelGroup, SingleProcess

__all__ = [
    "DeepseekV3ForCausalLM",
    "ExpertShard",
    "LossWeights",
    "Losses",
    "SequenceParallelGroup",
    "SingleProcess",
    "config_from_dict",
    "load_config",
    "recompute",
]
