"""What the plan says of shared experts: where tokens go, by a simulation; what travels and is held, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from src.models.deepseek_v3.sizes import read_sizes
from src.planner.cluster import Cluster, cluster_of
from src.planner.ledger import SHARDS, total
from src.planner.micro_step import micro_step
from src.planner.network import halves
from src.planner.settings import Settings
from src.planner.streams import EP, ZERO, received
from src.planner.tensors import Tensors
from src.planner.timing import step_time
from src.planner.work import Work

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
    assert settings.reach == pytest.approx(np.mean(found), rel=0.02)


def test_weights_travel_between_nodes_and_tokens_within() -> None:
    settings, plain = shared(8), guide()
    done, before = micro_step(settings, Cluster()), micro_step(plain, Cluster())
    here = EXPERTS / 8
    # Of the last layer one shard, an eighth of its experts, is still there when its backward begins.
    assert done.gathered[32] == 2 * here - EXPERTS / 58 / 8 and done.reduced[32] == here
    assert done.reduced[256] == before.reduced[256] - EXPERTS and set(before.reduced) == {256}
    dense = 255 / 256 * (2 * done.gathered[256] + 4 * done.reduced[256])
    experts = 31 / 32 * (2 * done.gathered[32] + 4 * done.reduced[32])
    assert received(done.ops, ZERO) == pytest.approx(dense + experts)
    tokens = 5 * 58 * 32768 * settings.reach * 1.15 * 7 / 8
    assert received(done.ops, EP) == pytest.approx(tokens * 7168 * 2)
    assert received(before.ops, EP) == 0


@pytest.mark.parametrize("ep", [1, 2, 8])
def test_gradients_in_bf16_halve_what_experts_send(ep: int) -> None:
    before, after = (step_time(shared(ep, **half), Cluster()) for half in ({}, {"reduce_dtype": "bf16"}))
    holders = 256 // ep
    assert after.schedule.halved == EXPERTS / ep
    less = received(before.schedule.ops, ZERO) - received(after.schedule.ops, ZERO)
    assert less == pytest.approx(2 * EXPERTS / ep * (holders - 1) / holders)
    assert sum(after.streams.values()) < sum(before.streams.values())
    assert after.schedule.ledger.peak <= before.schedule.ledger.peak * 1.05
    fp32, asked = (micro_step(shared(ep, param_bytes=4, reduce_dtype=d), Cluster()) for d in ("fp32", "bf16"))
    assert received(fp32.ops, ZERO) == received(asked.ops, ZERO)


def test_an_exchange_in_two_waits_for_the_longer_one() -> None:
    settings, cluster = shared(1, reduce_dtype="bf16"), Cluster()
    within = 2 * 2**30 * 7 / 8 / (cluster.nccl_intra_node_gb_s * 1e9)
    between = 2 * 2**30 * 31 / 32 / (cluster.nccl_inter_node_gb_s * 1e9)
    expected = max(within, between) + min(within, between) / 4  # four pieces
    assert halves(settings, cluster, 2**30).seconds == pytest.approx(expected, rel=0.1)  # and latencies


def test_an_exchange_takes_what_was_measured_of_exchanges() -> None:
    slow = cluster_of({"exchange_inter_node_gb_s": 10.0, "exchange_intra_node_gb_s": 20.0})
    assert slow.nccl_inter_node_gb_s == Cluster().nccl_inter_node_gb_s

    def seconds(settings: Settings) -> float:
        return halves(settings, slow, 2**36).seconds

    between = 2 * 2**36 * 31 / 32 / 10e9
    shared_by_all, in_two = shared(8, reduce_dtype="bf16"), shared(1, reduce_dtype="bf16")
    assert seconds(shared_by_all) == pytest.approx(between, rel=1e-3)
    within = 2 * 2**36 * 7 / 8 / 20e9
    assert seconds(in_two) == pytest.approx(within + between / 8 / 256, rel=1e-3)
    assert seconds(shared(1, nodes=1, reduce_dtype="bf16")) == pytest.approx(within, rel=1e-3)
    tokens = Work(shared_by_all, slow).travel(1).seconds / Work(shared_by_all, Cluster()).travel(1).seconds
    assert tokens == pytest.approx(370 / 20, rel=1e-2)


def test_exchanges_that_were_not_measured_go_at_the_rate_of_gathers() -> None:
    known = cluster_of({"nccl_inter_node_gb_s": 160.0, "nccl_intra_node_gb_s": 300.0, "gpus_per_node": 4})
    assert (known.exchange_inter_node_gb_s, known.exchange_intra_node_gb_s) == (40.0, 300.0)
    assert {"exchange_inter_node_gb_s", "exchange_intra_node_gb_s"} <= {*known.assumed}


def test_on_one_node_nothing_of_the_experts_is_gathered_or_held() -> None:
    def held(settings: Settings) -> float:
        return total(line for line in micro_step(settings, Cluster()).ledger.at_peak.values() if line.name == SHARDS)

    alone = shared(8, nodes=1)
    assert held(alone) < 2e9 < held(guide(nodes=1))  # without: shards of 2.8e9 bytes
    schedule = micro_step(alone, Cluster())
    dense = 7 / 8 * (2 * schedule.gathered[8] + 4 * schedule.reduced[8])
    assert received(schedule.ops, ZERO) == pytest.approx(dense)


@pytest.mark.parametrize("ep", [3, 16, 512])
def test_sizes_that_do_not_divide_are_refused(ep: int) -> None:
    with pytest.raises(ValueError, match=f"expert_parallel_size {ep} must divide"):
        guide(nodes=1, ep=ep)


def test_tokens_travel_beside_the_shared_expert_and_its_backward() -> None:
    settings, cluster = shared(8), Cluster()
    work, time = Work(settings, cluster), step_time(settings, cluster)
    spans = {span.op.name: span for span in time.spans}
    come, experts = spans["layer 9 router, shared tokens come"], spans["layer 9 shard 0"]
    assert come.start == spans["layer 9 router, shared"].end and experts.start >= come.end
    back = spans["layer 9 shard 0 sums return"]
    assert back.start == experts.end and spans["layer 10 attention latents"].start >= back.end
    both, shard = spans["layer 9 router, shared backward tokens and gradients come"], spans["layer 9 shard 0 backward"]
    assert both.start < spans["layer 9 router, shared backward"].end <= shard.start and both.end <= shard.start
    assert 58 * 2 * work.travel(1).seconds < time.travel < time.streams[EP]
    assert time.streams[EP] == pytest.approx(58 * (3 * work.travel(1).seconds + work.travel(2).seconds))


def test_a_rank_holds_no_more_tokens_than_the_bound() -> None:
    eight, two = shared(8), shared(2)
    a_token = 32768 * 7168 * 2
    assert Tensors(eight).experts[2].nbytes == pytest.approx(a_token * (1 + 2 * 1.5 * eight.reach))
    assert Tensors(two).experts[2].nbytes == pytest.approx(a_token * (1 + 2 * 2))  # all of two ranks
