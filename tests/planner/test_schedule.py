"""The simulation: streams' invariants, ZeRO's gathers, and a layer's time against what was measured."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.planner.cluster import Cluster
from src.planner.micro_step import micro_step
from src.planner.rates import ATTENTION_BESIDE, EXPERTS_BESIDE, PRODUCTS_BESIDE
from src.planner.settings import Settings
from src.planner.streams import COMPUTE, HOST, SP, STREAMS, ZERO, Op, busy, makespan, play, received
from src.planner.timing import busiest, step_time
from tests.planner.settings import guide, sizes

OPS = st.lists(
    st.tuples(
        st.sampled_from(STREAMS),
        st.floats(0, 10),
        st.lists(st.integers(0, 100), max_size=3),
        st.sampled_from([(1.0, 1.0), EXPERTS_BESIDE, PRODUCTS_BESIDE, ATTENTION_BESIDE]),
    ),
    max_size=30,
)


@given(OPS)
def test_a_schedule_is_no_shorter_than_any_stream_and_no_longer_than_all_together(
    drawn: list[tuple[str, float, list[int], tuple[float, float]]],
) -> None:
    ops = [
        Op(stream, seconds, str(i), tuple(j for j in after if j < i), beside)
        for i, (stream, seconds, after, beside) in enumerate(drawn)
    ]
    spans = play(ops)
    assert makespan(spans) >= max(busy(ops).values()) - 1e-9
    assert makespan(spans) <= sum(busy(ops).values()) + 1e-9
    for span in spans:
        assert all(spans[i].end <= span.start for i in span.op.after)


def test_a_chain_that_nothing_overlaps_takes_its_sum() -> None:
    ops = [Op(STREAMS[i % len(STREAMS)], 0.5 + i, str(i), (i - 1,) if i else ()) for i in range(12)]
    assert makespan(play(ops)) == pytest.approx(sum(op.seconds for op in ops))


def test_computation_and_collectives_slow_each_other() -> None:
    ops = [Op(COMPUTE, 10.0, "products", (), (1.5, 2.0)), Op(ZERO, 4.0, "gather"), Op(COMPUTE, 1.0, "more")]
    products, gather, more = play(ops)
    assert (gather.start, gather.end) == (0.0, 8.0)
    assert products.end == pytest.approx(8.0 + 10.0 - 8.0 / 1.5)
    assert more.end == products.end + 1.0
    time = step_time(guide(sp=1), Cluster())
    assert time.slowed > 1.0 and step_time(guide(nodes=1, gpus=1, sp=1), Cluster()).slowed < 1e-6


def test_a_gather_of_the_whole_model_takes_3_6_seconds_and_the_experts_are_gathered_twice() -> None:
    schedule = micro_step(guide(), Cluster())
    parameters = sizes().parameters
    gathers = schedule.gathered.total() / parameters
    assert 2.0 < gathers < 2.06  # attention's and the shared experts' weights once more, for the recomputation
    assert schedule.reduced.total() == pytest.approx(parameters, rel=1e-5)
    network = busy(schedule.ops)[ZERO]
    one = parameters * 2 / 370e9  # 3.63 s
    assert one == pytest.approx(3.63, abs=0.01)
    assert network == pytest.approx((gathers + 2) * one, rel=0.07)  # gradients in fp32 count twice; and latency


def test_all_that_was_allocated_is_freed() -> None:
    for changes in (
        {},
        {"attention_output": "offload", "layer_input": "offload"},
        {"attention_output": "keep", "sp": 4},
    ):
        assert not micro_step(guide(**changes), Cluster()).ledger.live
    assert not micro_step(guide(activation_checkpointing=False), Cluster()).ledger.live
    assert not micro_step(guide(sizes=sizes(mtp=True)), Cluster()).ledger.live


def computed(settings: Settings) -> float:
    """Seconds of the layers' own work: without the engine's casts and copies, which share the device with it."""
    schedule = micro_step(settings, Cluster())
    return busy(schedule.ops)[COMPUTE] - schedule.paid


# benchmarks/RESULTS.md, "A whole MoE layer": documents, tokens, what becomes of attention's output, ms.
@pytest.mark.parametrize(
    ("document", "tokens", "kept", "measured"),
    [
        (32768, 32768, "keep", 540.6),
        (32768, 32768, "recompute", 612.5),
        (4096, 32768, "keep", 289.0),
        (4096, 32768, "recompute", 310.5),
        (4096, 16384, "keep", 155.9),
        (8192, 8192, "keep", 99.5),
        (8192, 8192, "recompute", 105.1),
    ],
)
def test_a_layers_time_is_what_was_measured(document: int, tokens: int, kept: str, measured: float) -> None:
    def compute(layers: int) -> float:
        model = replace(sizes(), num_hidden_layers=layers, first_k_dense_replace=0, vocab_size=1024)
        settings = Settings(model, 1, 1, max_length=tokens, document=document, attention_output=kept)
        return computed(settings)

    assert 1e3 * (compute(3) - compute(2)) == pytest.approx(measured, rel=0.06)


# "What one SP rank computes": one row of 32,768.
@pytest.mark.parametrize(("sp", "measured"), [(2, 286.4), (4, 156.2), (8, 93.4)])
def test_an_sp_ranks_time_is_what_was_measured(sp: int, measured: float) -> None:
    def compute(layers: int) -> float:
        model = replace(sizes(), num_hidden_layers=layers, first_k_dense_replace=0, vocab_size=1024)
        settings = Settings(model, 1, sp, sp=sp, attention_output="keep")
        return computed(settings)

    assert 1e3 * (compute(3) - compute(2)) == pytest.approx(measured, rel=0.10)


def test_sp_exchanges_what_was_counted() -> None:
    """benchmarks/RESULTS.md: 291 MiB a layer forward at SP = 4, as much backward; here the recomputation besides."""
    cluster = replace(Cluster(), exchange_intra_node_gb_s=1e-3)  # so slow that latency is nothing
    ops = micro_step(guide(sp=4), cluster).ops
    assert received(ops, SP) / 2**20 / 61 == pytest.approx(3 * 291, rel=0.01)
    assert busy(ops)[SP] * 1e6 == pytest.approx(received(ops, SP), rel=0.01)


def test_a_slower_network_is_exposed_and_a_faster_one_hides() -> None:
    slow = step_time(guide(sp=4), replace(Cluster(), nccl_inter_node_gb_s=46.0))
    fast = step_time(guide(sp=1), replace(Cluster(), nccl_inter_node_gb_s=4000.0))
    assert slow.micro > 100 and slow.exposed > 0.8 * slow.micro  # one network card a node: 14.5 s become 117
    assert fast.exposed < 0.1 * fast.micro


def test_the_host_waits_for_the_route_of_each_layer() -> None:
    ops = micro_step(guide(), Cluster()).ops
    routes = [i for i, op in enumerate(ops) if op.name.endswith("router, shared")]
    assert len(routes) == 58
    assert all(ops[i + 1].stream == HOST and ops[i + 1].after == (i,) for i in routes)


# benchmarks/RESULTS.md, "What the host needs": of 61 layers, those that are dense; seconds.
@pytest.mark.parametrize(("dense", "measured"), [(60, 1.02), (3, 2.00)])
def test_a_gpu_with_little_to_do_waits_for_the_host_as_measured(dense: int, measured: float) -> None:
    narrow = replace(
        sizes(),
        hidden_size=1024,
        moe_intermediate_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        q_lora_rank=192,
        kv_lora_rank=128,
        vocab_size=16384,
        first_k_dense_replace=dense,
        experts_per_shard=256,
    )
    network = replace(Cluster(), nccl_inter_node_gb_s=1000.0)
    settings = guide(sizes=narrow, max_length=64, document=64, batch_size=1, offload_optimizer=False)
    time = step_time(settings, network)
    assert time.micro == pytest.approx(measured, rel=0.1)
    assert time.host > 0.7 * time.exposed and busiest(time) == HOST
    assert step_time(guide(), Cluster()).host < 0.01 * step_time(guide(), Cluster()).micro
