"""Which settings fit, and which are best: the nearest to a given one, the fastest of all, and the cost by size."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations, product

from src.models.deepseek_v3.sizes import shard_size
from src.planner.account import host, states
from src.planner.cluster import Cluster
from src.planner.ledger import total
from src.planner.plan import Data, Plan, make_plan
from src.planner.settings import Settings, argument
from src.units import GIB

TOKENS = (8192, 16384, 32768, 65536)  # per GPU and micro-step, that --search tries
PAYS = 1.6  # times as fast as half the GPUs: less does not pay

Change = tuple[str, object]  # a field of Settings, and its value
Progress = Callable[[Iterable[float], int], Iterable[float]]  # of results, as they come, and their number


def _possible(settings: Settings, **changes: object) -> Settings | None:
    """None where the numbers do not divide. Another ep has the shards that 'auto' takes with it."""
    try:
        changed = settings.but(**changes)
        s = changed.sizes
        asked = s.experts_per_shard if changed.ep == settings.ep or "experts_per_shard" in changes else None
        size = shard_size(s.n_routed_experts, s.hidden_size, s.moe_intermediate_size, asked, changed.ep)
    except ValueError:
        return None
    return changed.but(experts_per_shard=size)


def _changes(settings: Settings, host_is_full: bool) -> list[Change]:
    """Single steps away from `settings`."""
    s = settings
    near: list[Change] = [
        ("stage", 3),
        ("activation_checkpointing", True),
        ("attention_output", "offload"),
        ("attention_output", "recompute"),
        ("layer_input", "keep" if s.layer_input == "offload" else "offload"),
        ("offload_optimizer", True),
        ("async_save", s.async_save and not host_is_full),
        ("batch_size", max(1, s.batch_size // 2)),
        ("sp", 2 * s.sp),
        # Its groups have buffers of their own, and a node's sums take memory.
        ("reduce_dtype", "fp32" if s.halves else s.reduce_dtype),
        ("experts_per_shard", max(1, s.experts_per_shard // 2)),
        ("nodes", 2 * s.nodes),
        ("nodes", 4 * s.nodes),
    ]
    return [(field, value) for field, value in near if value != getattr(s, field)]


def _with_rows(settings: Settings, rows: int) -> Settings | None:
    """With the accumulation that gives `rows` a step; None where there is none."""
    once = settings.but(accumulate=1).rows_per_step
    return None if rows % once else settings.but(accumulate=rows // once)


def _near_rows(settings: Settings, rows: int) -> Settings:
    """With the accumulation that comes nearest to `rows` a step."""
    return settings.but(accumulate=max(1, round(rows / settings.but(accumulate=1).rows_per_step)))


def nearest(settings: Settings, cluster: Cluster, data: Data) -> tuple[str, Plan] | None:
    """The fewest changes that make it fit, and its plan; None where three do not suffice.

    Ties go to the fewest nodes, then to the fastest per GPU. Accumulation follows to keep the rows per step, and is no
    change of its own.
    """
    steps = _changes(settings, host_is_full=total(host(settings)) > cluster.host_room)
    for count in (1, 2, 3):
        fitting = []
        for chosen in combinations(steps, count):
            if len(dict(chosen)) < count:
                continue  # two values of one setting
            changed = _possible(settings, **dict(chosen))
            changed = changed and _with_rows(changed, settings.rows_per_step)
            if changed and _may_fit(changed, cluster):
                plan = make_plan(changed, cluster, data, quick=True)
                if plan.fits:
                    follows = [("accumulate", changed.accumulate)] * (changed.accumulate != settings.accumulate)
                    fitting.append((" ".join(argument(*change) for change in [*chosen, *follows]), plan))
        if fitting:
            return min(fitting, key=lambda item: (item[1].settings.nodes, -item[1].rate()))
    return None


def candidates(settings: Settings, nodes: Sequence[int] | None = None) -> list[Settings]:
    """The grid of --search around `settings`, with rows per step as near as the numbers allow.

    Args:
        nodes: numbers of nodes to try; by default that of `settings` alone.
    """
    s = settings
    offloads = ((False, False), (True, False), (True, True))
    kept = (
        ("recompute", "keep"), ("recompute", "offload"), ("offload", "keep"), ("offload", "offload"), ("keep", "keep"),
    )  # fmt: skip
    # Batches by the tokens they give a GPU, which is what a step's time and memory depend on.
    batches = {sp: sorted({max(1, tokens * sp // s.max_length) for tokens in TOKENS}) for sp in (1, 2, 4, 8)}
    shared = sorted({1, s.ep, s.gpus})
    grid = []
    for n, ep, sp, (optimizer, parameters), (output, layer) in product(
        nodes or [s.nodes], shared, batches, offloads, kept
    ):
        places: dict[str, object] = {"offload_optimizer": optimizer, "offload_parameters": parameters}
        places |= {"attention_output": output, "layer_input": layer}
        for batch in batches[sp]:
            if changed := _possible(s, nodes=n, ep=ep, sp=sp, batch_size=batch, **places):
                grid.append(_near_rows(changed, s.rows_per_step))
    return grid


def _may_fit(settings: Settings, cluster: Cluster) -> bool:
    """By the states of the device and by host memory, for which no schedule is needed."""
    device = total(states(settings))
    return device < cluster.gpu_memory_gib * GIB and total(host(settings)) <= cluster.host_room


def _rate(cluster: Cluster, data: Data, settings: Settings) -> float:
    """Tokens/s per GPU; 0 where it does not fit."""
    plan = make_plan(settings, cluster, data, quick=True)
    return plan.rate() if plan.fits else 0.0


def search(
    settings: Settings,
    cluster: Cluster,
    data: Data,
    progress: Progress | None = None,
    best: int = 10,
    nodes: Sequence[int] | None = None,
) -> list[Plan]:
    """The settings of the grid that fit, fastest per GPU first.

    Of the best it also tries shards of half the experts, half as many ranks that share them, and gradients in bf16.
    Simulated by up to 16 new processes, one per core: __main__ must be importable.
    """
    grid = [c for c in candidates(settings, nodes) if _may_fit(c, cluster)]
    with ProcessPoolExecutor(min(16, len(os.sched_getaffinity(0))), multiprocessing.get_context("spawn")) as pool:

        def fastest(grid: list[Settings]) -> list[tuple[float, Settings]]:
            rates = pool.map(partial(_rate, cluster, data), grid, chunksize=4)
            rated = zip(progress(rates, len(grid)) if progress else rates, grid, strict=True)
            return sorted((pair for pair in rated if pair[0]), key=lambda pair: -pair[0])[:best]

        rated_best = fastest(grid)
        halves = [_possible(s, experts_per_shard=s.experts_per_shard // 2) for _, s in rated_best]
        halves += [_possible(s, ep=s.ep // 2) for _, s in rated_best if s.ep > 2]
        rated_best += fastest([half for half in halves if half])
        wide = [s for _, s in rated_best if s.stage == 3 and s.reduce_dtype == "fp32"]
        rated_best += fastest([half for s in wide if (half := s.but(reduce_dtype="bf16")).halves])
    plans = [make_plan(s, cluster, data, quick=True) for _, s in rated_best]
    return sorted(plans, key=lambda plan: -plan.rate())[:best]


def scale(settings: Settings, cluster: Cluster, data: Data, most: int = 4096) -> list[Plan]:
    """The same settings on one node to `most` GPUs, with the accumulation that keeps the rows per step nearest."""
    plans, gpus = [], settings.gpus
    while gpus <= most:
        if changed := _possible(settings, nodes=gpus // settings.gpus):
            plans.append(make_plan(_near_rows(changed, settings.rows_per_step), cluster, data, quick=True))
        gpus *= 2
    return plans


def pays_until(plans: list[Plan]) -> Plan | None:
    """The last of the doubling sizes to be PAYS times as fast as the one before; None: none fits."""
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return None
    last = fitting[0]
    for plan in fitting[1:]:
        if last.wall() / plan.wall() < PAYS:
            break
        last = plan
    return last
