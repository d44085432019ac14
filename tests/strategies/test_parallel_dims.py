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
