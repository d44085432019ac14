"""DeepSeek-V3 on the guide's cluster, for the planner's tests."""

from typing import Any

from src.models.deepseek_v3.sizes import Sizes, read_sizes
from src.planner.plan import Data
from src.planner.settings import Settings

MODEL = "configs/models/deepseek-v3"
ROWS = Data(100_000, 100_000 * 32768, 1, "100,000 full rows")


def sizes(mtp: bool = False) -> Sizes:
    return read_sizes(MODEL, None, mtp)


def guide(**changes: Any) -> Settings:
    """32 nodes of 8, one row of 32,768 tokens a GPU, optimizer in host memory, no multi-token prediction."""
    given: dict[str, Any] = {"sizes": sizes(), "nodes": 32, "gpus": 8, "offload_optimizer": True, "accumulate": 4}
    return Settings(**(given | changes))
