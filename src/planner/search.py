"""Which settings fit, and which are best: the nearest to a given one, the fastest of all, and the cost by size."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations, product

from src.models.deepseek_v3.sizes import auto_experts_per_shard
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
    experts = changes.pop("experts_per_shard", None)
    try:
        changed = settings.but(**changes)
    except ValueError:
        return None
    sizes = changed.sizes
    here = sizes.n_routed_experts // changed.ep
    if experts is None and changed.ep != settings.ep:
        experts = auto_experts_per_shard(here, sizes.hidden_size, sizes.moe_intermediate_size)
    if isinstance(experts, int):
        if not 1 <= experts <= here or here % experts:
            return None
        changed = changed.but(experts_per_shard=experts)
    return None if changed.offload_parameters and changed.stage != 3 else changed


def _changes(settings: Settings, host_is_full: bool) -> Iterator[Change]:
    """Single steps away from `settings`."""
    s = settings
    if s.stage != 3:
        yield "stage", 3
    if not s.activation_checkpointing:
        yield "activation_checkpointing", True
    for output in ("offload", "recompute"):
        if s.attention_output != output:
            yield "attention_output", output
    yield "layer_input", "keep" if s.layer_input == "offload" else "offload"
    if not s.offload_optimizer:
        yield "offload_optimizer", True
    if s.async_save and host_is_full:
        yield "async_save", False
    if s.batch_size > 1:
        yield "batch_size", s.batch_size // 2
    yield "sp", 2 * s.sp
    if s.halves:  # its groups have buffers of their own, and a node's sums take memory
        yield "reduce_dtype", "fp32"
    if s.experts_per_shard > 1:
        yield "experts_per_shard", s.experts_per_shard // 2
    for factor in (2, 4):
        yield "nodes", factor * s.nodes


def _with_rows(settings: Settings, rows: int) -> Settings | None:
    """With the accumulation that gives `rows` a step; None where there is none."""
    once = settings.but(accumulate=1).rows_per_step
    return None if rows % once else settings.but(accumulate=rows // once)


def _near_rows(settings: Settings, rows: int) -> Settings:
    """With the accumulation that comes nearest to `rows` a step."""
    return settings.but(accumulate=max(1, round(rows / settings.but(accumulate=1).rows_per_step)))


def nearest(settings: Settings, cluster: Cluster, data: Data) -> tuple[str, Plan] | None:
    """The fewest changes that make it fit, and its plan; None where three do not suffice.

    Among as many, those on the fewest nodes, then the fastest a GPU. Accumulation follows, so that the rows of a step
    stay; it counts as no change of its own.
    """
    steps = list(_changes(settings, total(host(settings)) > cluster.host_room))
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
    """The grid of --search around `settings`, whose rows per step stay as near as the numbers allow.

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
        for batch in batches[sp]:
            base = _possible(s, nodes=n, ep=ep, sp=sp, batch_size=batch)
            if base is not None:
                with_rows = _near_rows(base, s.rows_per_step)
                kept_so = {"attention_output": output, "layer_input": layer}
                grid.append(with_rows.but(offload_optimizer=optimizer, offload_parameters=parameters, **kept_so))
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
    """The fastest a GPU of the grid that fit, best first; shards of half the experts, half as many ranks that share
    them, and gradients in bf16 are tried where that is fast.

    Simulated on this process's cores, up to 16, by new processes: __main__ must be importable.
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
    """The same settings on 8 to `most` GPUs, accumulation so that the rows of a step stay as near as they can."""
    plans, gpus = [], settings.gpus
    while gpus <= most:
        if changed := _possible(settings, nodes=gpus // settings.gpus):
            plans.append(make_plan(_near_rows(changed, settings.rows_per_step), cluster, data, quick=True))
        gpus *= 2
    return plans


def pays_until(plans: list[Plan]) -> Plan | None:
    """The largest of doubling sizes whose doubling still made the run at least PAYS times as fast; None: none fits."""
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return None
    last = fitting[0]
    for plan in fitting[1:]:
        if last.wall() / plan.wall() < PAYS:
            break
        last = plan
    return last
