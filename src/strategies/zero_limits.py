"""ZeRO's limits, and which settings go together; without torch, so that the planner reads what the strategy does."""

from collections.abc import Mapping, Sequence
from typing import Any

from src.errors import UserError

STRATEGY = "trainer.strategy.init_args."  # before the strategy's options in a config

# Bytes of a whole parameter from which it is gathered into memory of its own: copying it out of a buffer that it shares
# would cost more than one more collective.
OWN_MEMORY = 32 * 2**20
# Elements of a gradient that are fp32 at once, twice: one piece is cast while the one before is on its way. 1 GiB keeps
# NCCL at its full bandwidth over 256 ranks.
PIECE = 2**28


def reduced_in_pieces(size: int, world: int) -> bool:
    """Whether a gradient of so many elements is: where two pieces and this rank's part are less than the whole."""
    part = -(-size // world)
    return 2 * PIECE + part < world * part


def zero3_limits(shard: int) -> dict[str, int]:
    """ZeRO-3's prefetch sized so that the shard in use and the next one are in memory, never a layer.

    In elements: `stage3_prefetch_bucket_size` about a shard, `stage3_max_live_parameters` two to three of them, and no
    gathered parameter kept for reuse.

    Args:
        shard: elements of an expert shard; without experts, of the largest parameter.
    """
    return {
        "stage3_prefetch_bucket_size": shard + shard // 8,
        "stage3_max_live_parameters": 2 * shard + shard // 2,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 100_000,
    }


def check_stage(stage: int, precision: str) -> None:
    """Refuses bf16 without ZeRO, where DeepSpeed accumulates no gradients in fp32.

    Args:
        precision: of the Trainer, "bf16-true" or "32-true".
    """
    if stage == 0 and not precision.startswith("32"):
        raise UserError(
            f"trainer.strategy.init_args.stage is 0 with trainer.precision {precision}: DeepSpeed accumulates "
            "gradients of bf16 weights in fp32 at stages 1 to 3 alone; take one, or --trainer.precision 32-true."
        )


def check_goes_with(option: str, zero: Mapping[str, Any], off: Mapping[str, Any], more: Sequence[str] = ()) -> None:
    """Refuses an option that needs stage 3, and none of ZeRO's settings that do the same work in another way.

    Args:
        zero: ZeRO's settings.
        off: those settings, with the values that turn them off.
        more: other settings that it does not go with.
    """
    if zero.get("stage") != 3:
        raise UserError(f"{option} needs ZeRO stage 3, stage is {zero.get('stage')}: set one of the two back.")
    wrong = [f"{name} {zero[name]}" for name, value in off.items() if zero.get(name, value) not in (value, None)]
    if wrong := [*wrong, *more]:
        raise UserError(f"{option} does not go with {', '.join(wrong)}: set one of the two back.")
