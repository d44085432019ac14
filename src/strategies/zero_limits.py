"""How much ZeRO-3 gathers ahead and holds; without torch, so that the planner reads what the strategy sets."""


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
