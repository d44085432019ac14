"""Gradients sent in bf16 sum to what fp64 says, up to one rounding per node, and the host's work does not grow.

Integers of eight bits are exact in bf16 and in every fp32 sum, whatever its order: on them bits are compared.
"""

from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from src.models.deepseek_v3 import ExpertShard
from src.strategies import DeepSpeedSPStrategy, zero_limits
from src.strategies.bf16_reduction import BF16Reduction, check_nodes, make_groups
from src.strategies.expert_parallel import make_groups as make_expert_groups
from src.strategies.parallel_dims import ParallelDims
from src.strategies.partition import materialise
from src.strategies.zero3_collectives import reduce_by_one_view, reduce_scatter
from tests.distributed.spawn import run_distributed

from .test_zero3_collectives import SHAPES, Calls, begin

U = 2.0**-8  # of bf16: how far rounding to the nearest moves a number of size 1


def of_rank(rank: int, shape: tuple[int, ...], integers: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + sum(shape))
    if integers:
        return torch.randint(-255, 256, shape, generator=generator).bfloat16()
    return torch.randn(shape, generator=generator).bfloat16()


def part(whole: Tensor, rank: int, world: int) -> Tensor:
    size = -(-whole.numel() // world)
    return whole.flatten()[rank * size : (rank + 1) * size]


def by_node(shape: tuple[int, ...], ranks: list[int], per_node: int, integers: bool) -> list[Tensor]:
    """Each node's sum, of the given ranks, in fp64."""
    nodes = [ranks[i : i + per_node] for i in range(0, len(ranks), per_node)]
    return [torch.stack([of_rank(r, shape, integers).double() for r in node]).sum(0) for node in nodes]


def reductions(world: int) -> None:
    begin(2)  # gloo, as on real processes
    rank, shapes = dist.get_rank(), [*SHAPES, (world * 37,), (world * 40 + 3,), (world - 1, 3)]
    layouts = [(per_node, ep) for per_node in (1, 2, world) for ep in (1, 2) if per_node % ep == 0 or ep == 1]
    for per_node, ep in dict.fromkeys(layouts):
        dims = ParallelDims(world, 1, rank, ep, per_node)
        same: Any = dist.group.WORLD if ep == 1 else make_expert_groups(dims, None).same
        groups = make_groups(dims, same)
        ranks = list(range(rank % ep, world, ep))
        place, here = ranks.index(rank), dims.holders_per_node
        once = here in (1, len(ranks))
        assert [g.size() for g in groups] == ([len(ranks)] if once else [here, len(ranks) // here])
        reduction = BF16Reduction(groups, set())
        # A bucket, whole gradients, and pieces of 16 columns of one whose last part ends early.
        for piece, bucket in ((2**28, shapes), (2**28, [(7,)]), (16 * world, [(world * 40 + 3,)])):
            zero_limits.PIECE = piece
            for integers in (True, False):
                mine = [of_rank(rank, shape, integers) for shape in bucket]
                ours = reduction.reduce_scatter(mine, place, 3)
                again = reduction.reduce_scatter([g.clone() for g in mine], place, 3)
                theirs = reduce_scatter([g.clone() for g in mine], same, torch.float32, 4)
                for shape, got, same_bits, fp32 in zip(bucket, ours, again, theirs, strict=True):
                    assert got.dtype == torch.float32 and torch.equal(got, same_bits)
                    nodes = by_node(shape, ranks, here, integers)
                    exact = part(torch.stack(nodes).sum(0), place, len(ranks))
                    assert got.shape == exact.shape == fp32.shape
                    if integers:
                        rounded = (
                            exact
                            if once
                            else part(torch.stack([s.bfloat16().double() for s in nodes]).sum(0), place, len(ranks))
                        )
                        assert torch.equal(got, rounded.float() / 3)
                        assert not once or torch.equal(got, fp32 * 4 / 3)
                        continue
                    bound = 2.0**-20 * sum(
                        part(of_rank(r, shape, False).abs().double(), place, len(ranks)) for r in ranks
                    )
                    if not once:
                        bound = bound + U * sum(part(s.abs(), place, len(ranks)) for s in nodes)
                    assert ((3 * got.double() - exact).abs() <= bound).all()
                    assert ((3 * got.double() - 4 * fp32.double()).abs() <= 2 * bound).all()


@pytest.mark.parametrize("world", [4, 8])
def test_sums_are_those_of_fp64_up_to_one_rounding_per_node(world: int) -> None:
    run_distributed(reductions, world, world)


def buckets(ep: int) -> None:
    begin(2)
    rank = dist.get_rank()
    dims = ParallelDims(4, 1, rank, ep, 2)
    shared = make_expert_groups(dims, None) if ep > 1 else None
    groups = make_groups(dims, shared.same if shared else dist.group.WORLD)  # type: ignore[arg-type]
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    config |= {"data_types": {"grad_accum_dtype": "fp32"}}
    with torch.device("meta"):
        model = torch.nn.ModuleList([torch.nn.Linear(5, 7), ExpertShard(2, 5, 3), ExpertShard(1, 5, 3)]).bfloat16()
    materialise(model, config, 3, torch.device("cpu"), shared)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config=config | {"zero_allow_untested_optimizer": True},
    )
    zero: Any = engine.optimizer
    params: list[Any] = list(model.parameters())
    experts = {id(p) for shard in model[1:] for p in shard.parameters()}
    halved = BF16Reduction(groups, {p.ds_id for p in params if id(p) in experts})
    # Without expert parallelism dense parameters and experts share a bucket, in any order.
    mixed = [params] if ep == 1 else [[p for p in params if (id(p) in experts) == which] for which in (True, False)]
    for dtype in (torch.bfloat16, torch.float32):
        for members in (order for bucket in mixed for order in (bucket, bucket[::-1])):
            reduced: Any = [
                SimpleNamespace(**vars(p) | {"grad": of_rank(rank, tuple(p.ds_shape), True).to(dtype)}) for p in members
            ]
            found = []
            for half in (None, halved):
                reduce_by_one_view(zero, half)
                found.append(zero._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(reduced, torch.float32))
            for p, fp32, bf16 in zip(members, *found, strict=True):
                if id(p) not in experts or dtype == torch.float32 or ep == 2:  # one rank of an expert on each node
                    assert torch.equal(fp32, bf16)
                    continue
                nodes = by_node(tuple(p.ds_shape), [0, 1, 2, 3], 2, True)
                assert torch.equal(bf16, part(torch.stack([s.bfloat16().float() for s in nodes]).sum(0), rank, 4) / 4)


@pytest.mark.parametrize("ep", [1, 2])
def test_experts_alone_travel_in_bf16(ep: int) -> None:
    run_distributed(buckets, 4, ep)


def operations(world: int) -> list[tuple[dict[str, int], list[int]]]:
    begin(world)
    zero_limits.PIECE = world * 20  # pieces of as many columns at any size
    groups = make_groups(ParallelDims(world, 1, 0, 1, 8), dist.group.WORLD)  # type: ignore[arg-type]
    assert [group.size() for group in groups] == [8, world // 8]
    exchange, sent, counts = dist.all_to_all_single, list[int](), []

    def counted(out: Tensor, rows: Tensor, **arguments: Any) -> Any:
        sent.append(rows.nbytes // (world if rows.dim() == 3 else world // 8))
        assert rows.dtype == out.dtype == torch.bfloat16
        return exchange(out, rows, **arguments)

    dist.all_to_all_single = counted  # type: ignore[assignment]
    for sizes in ((64, 100, 3), (100,)):
        gradients = [torch.randn(world * n).bfloat16() for n in sizes]
        with Calls() as calls:
            BF16Reduction(groups, set()).reduce_scatter(gradients, 0, world)
        counts.append((dict(calls.by_name), sent.copy()))
        sent.clear()
    return counts


def test_the_host_does_the_same_at_any_world_size() -> None:
    small, large = (run_distributed(operations, 1, world)[0] for world in (16, 1024))
    assert small == large
    # Bytes per rank and exchange: of the bucket in two; of the large one in five pieces, each in two.
    assert [sent for _, sent in small] == [[334, 334], [40] * 10]


def test_unequal_nodes_are_refused() -> None:
    check_nodes([2, 2, 2, 2])
    for sizes, said in (([2, 2, 1], "rank 0 has 2, that of rank 2 1, WORLD_SIZE is 3"), ([2] * 3, "has 2, WORLD_SIZE")):
        with pytest.raises(ValueError, match=said):
            check_nodes(sizes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stage": 2}, "needs ZeRO stage 3, stage is 2"),
        ({"config": {}}, "needs ZeRO stage 3, stage is None"),
        ({"config": {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}}, "zero_quantized_gradients"),
        ({"config": {"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 2.0}}, "predivide_factor 2.0"),
    ],
)
def test_what_has_a_reduction_of_its_own_is_refused(settings: dict[str, Any], said: str) -> None:
    DeepSpeedSPStrategy(**settings)
    with pytest.raises(ValueError, match=said):
        DeepSpeedSPStrategy(reduce_dtype="bf16", **settings)
