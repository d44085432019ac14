from contextlib import suppress

import pytest

from src.strategies.parallel_dims import ParallelDims


def test_every_rank_has_its_place() -> None:
    dims = [ParallelDims(8, 4, rank) for rank in range(8)]
    assert [(d.dp_rank, d.sp_rank) for d in dims] == [(r // 4, r % 4) for r in range(8)]
    assert dims[0].dp == 2 and dims[0].sp_groups == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("world", "sp", "rank", "message"),
    [
        (6, 4, 0, r"WORLD_SIZE 6 .* sequence_parallel_size 4: .*it may be 1, 2, 3, 6"),
        (4, 0, 0, "sequence_parallel_size is 0"),
        (4, 2, 4, "rank 4 is not in a world of 4"),
    ],
)
def test_what_does_not_divide_is_refused(world: int, sp: int, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelDims(world, sp, rank)


def test_expert_groups_are_consecutive_and_those_of_equal_experts_strided() -> None:
    dims = ParallelDims(12, sp=3, ep=4, per_node=4)
    assert dims.ep_groups == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert dims.expert_dp_groups == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    for groups in (dims.ep_groups, dims.expert_dp_groups):
        assert sorted(rank for group in groups for rank in group) == list(range(12))
    one = ParallelDims(4, sp=2)
    assert one.ep_groups == [[0], [1], [2], [3]] and one.expert_dp_groups == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("world", "node", "experts", "sizes"),
    [(16, 8, 64, [1, 2, 4, 8, 16]), (24, 8, 48, [1, 2, 4, 8, 24]), (12, 6, 64, [1, 2]), (4, None, 6, [1, 2])],
)
def test_which_expert_parallel_sizes_are_taken(world: int, node: int | None, experts: int, sizes: list[int]) -> None:
    taken = []
    for size in range(world + 2):
        with suppress(ValueError):
            ParallelDims(world, 1, ep=size, per_node=node).check_experts(experts)
            taken.append(size)
    assert taken == sizes


def test_the_error_lists_the_sizes_that_are_taken() -> None:
    with pytest.raises(ValueError, match=r"expert_parallel_size 3 must divide the 8 .* It may be 1, 2, 4, 8, 16\.$"):
        ParallelDims(16, 1, ep=3, per_node=8)
    with pytest.raises(ValueError, match=r"size 8 .* 16 and the 12 experts of a layer\. It may be 1, 2, 4\.$"):
        ParallelDims(16, 1, ep=8, per_node=8).check_experts(12)


def test_only_groups_larger_than_a_node_leave_it() -> None:
    assert [ParallelDims(16, 1, ep=ep, per_node=4).leaves_node for ep in (1, 2, 4, 8, 16)] == [False] * 3 + [True] * 2
