"""What the plan says of shared experts: where tokens go, by a simulation; what travels and is held, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from src.models.deepseek_v3.sizes import read_sizes
from src.planner.cluster import Cluster, cluster_of
from src.planner.ledger import SHARDS
from src.planner.micro_step import micro_step
from src.planner.settings import Settings
from src.planner.timing import ep_bytes, network_bytes, step_time
from src.planner.work import Work
from src.planner.zero import halved_seconds

from .settings import MODEL, guide

EXPERTS = 58 * 256 * 3 * 7168 * 2048  # elements of DeepSeek-V3's


def shared(ep: int, **changes: object) -> Settings:
    return guide(sizes=read_sizes(MODEL, None, False, ep), ep=ep, **changes)


@pytest.mark.parametrize(("ep", "groups", "best"), [(8, 8, 4), (16, 8, 4), (4, 8, 4), (2, 8, 4), (8, 1, 1)])
def test_a_token_reaches_as_many_ranks_as_in_a_simulation(ep: int, groups: int, best: int) -> None:
    settings = shared(ep)
    settings = settings.but(sizes=replace(settings.sizes, n_group=groups, topk_group=best))
    generator, found = np.random.default_rng(0), []
    for _ in range(4000):
        chosen = generator.permutation(groups)[:best]
        candidates = np.flatnonzero(np.isin(np.arange(256) // (256 // groups), chosen))
        experts = generator.permutation(candidates)[:8]
        found.append(len(set(experts // (256 // ep))))
    assert Work(settings, Cluster()).reach == pytest.approx(np.mean(found), rel=0.02)


def test_weights_travel_between_nodes_and_tokens_within() -> None:
    settings, plain = shared(8), guide()
    time, before = step_time(settings, Cluster()), step_time(plain, Cluster())
    here, done = EXPERTS / 8, time.schedule
    # Of the last layer one shard, an eighth of its experts, is still there when its backward begins.
    assert done.shared_gathered == 2 * here - EXPERTS / 58 / 8 and done.shared_reduced == here
    assert done.reduced == before.schedule.reduced - EXPERTS
    dense = 255 / 256 * (2 * done.gathered + 4 * done.reduced)
    experts = 31 / 32 * (2 * done.shared_gathered + 4 * done.shared_reduced)
    assert network_bytes(settings, time) == pytest.approx(dense + experts)
    work = Work(settings, Cluster())
    assert ep_bytes(settings, work) == pytest.approx(5 * 58 * 32768 * work.reach * 1.15 * 7 / 8 * 7168 * 2)
    assert ep_bytes(plain, Work(plain, Cluster())) == 0


@pytest.mark.parametrize("ep", [1, 2, 8])
def test_gradients_in_bf16_halve_what_experts_send(ep: int) -> None:
    plain, half = shared(ep), shared(ep, reduce_dtype="bf16")
    before, after = step_time(plain, Cluster()), step_time(half, Cluster())
    holders = 256 // ep
    assert after.schedule.halved == EXPERTS / ep
    less = network_bytes(plain, before) - network_bytes(half, after)
    assert less == pytest.approx(2 * EXPERTS / ep * (holders - 1) / holders)
    assert sum(after.streams.values()) < sum(before.streams.values())
    assert after.schedule.ledger.peak <= before.schedule.ledger.peak * 1.05
    assert network_bytes(shared(ep, reduce_dtype="bf16", param_bytes=4), before) == network_bytes(
        shared(ep, param_bytes=4), before
    )


def test_an_exchange_in_two_waits_for_the_longer_one() -> None:
    settings, cluster = shared(1, reduce_dtype="bf16"), Cluster()
    within = 2 * 2**30 * 7 / 8 / (cluster.nccl_intra_node_gb_s * 1e9)
    between = 2 * 2**30 * 31 / 32 / (cluster.nccl_inter_node_gb_s * 1e9)
    expected = max(within, between) + min(within, between) / 4  # four pieces
    assert halved_seconds(settings, cluster, 2**30) == pytest.approx(expected, rel=0.1)  # and latencies


def test_an_exchange_takes_what_was_measured_of_exchanges() -> None:
    slow = cluster_of({"exchange_inter_node_gb_s": 10.0, "exchange_intra_node_gb_s": 20.0})
    assert slow.nccl_inter_node_gb_s == Cluster().nccl_inter_node_gb_s
    between = 2 * 2**36 * 31 / 32 / 10e9
    shared_by_all, in_two = shared(8, reduce_dtype="bf16"), shared(1, reduce_dtype="bf16")
    assert halved_seconds(shared_by_all, slow, 2**36) == pytest.approx(between, rel=1e-3)
    within = 2 * 2**36 * 7 / 8 / 20e9
    assert halved_seconds(in_two, slow, 2**36) == pytest.approx(within + between / 8 / 256, rel=1e-3)
    alone = shared(1, nodes=1, reduce_dtype="bf16")
    assert halved_seconds(alone, slow, 2**36) == pytest.approx(within, rel=1e-3)
    tokens = Work(shared_by_all, slow).travel(1) / Work(shared_by_all, Cluster()).travel(1)
    assert tokens == pytest.approx(370 / 20, rel=1e-2)


def test_exchanges_that_were_not_measured_go_at_the_rate_of_gathers() -> None:
    known = cluster_of({"nccl_inter_node_gb_s": 160.0, "nccl_intra_node_gb_s": 300.0, "gpus_per_node": 4})
    assert (known.exchange_inter_node_gb_s, known.exchange_intra_node_gb_s) == (40.0, 300.0)
    assert {"exchange_inter_node_gb_s", "exchange_intra_node_gb_s"} <= {*known.assumed}


def test_on_one_node_nothing_of_the_experts_is_gathered_or_held() -> None:
    def held(settings: Settings) -> float:
        largest = 0.0
        take = micro_step(settings, Cluster()).ledger.at_peak
        for line in take.values():
            largest += line.nbytes if line.name == SHARDS else 0
        return largest

    alone = shared(8, nodes=1)
    assert held(alone) < 2e9 < held(guide(nodes=1))  # without: shards of 2.8e9 bytes
    schedule = micro_step(alone, Cluster())
    assert network_bytes(alone, step_time(alone, Cluster())) == pytest.approx(
        7 / 8 * (2 * schedule.gathered + 4 * schedule.reduced)
    )


@pytest.mark.parametrize("ep", [3, 16, 512])
def test_sizes_that_do_not_divide_are_refused(ep: int) -> None:
    with pytest.raises(ValueError, match=f"expert_parallel_size {ep} must divide"):
        guide(nodes=1, ep=ep)
