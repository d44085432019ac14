"""Rank arithmetic: the one place that knows how world, data-parallel and sequence-parallel ranks relate."""

from dataclasses import dataclass

from src.errors import UserError, counted


@dataclass(frozen=True)
class ParallelDims:
    """world = dp x sp. Ranks of an SP group are consecutive, so that a group stays within a node where it fits.

    Raises:
        ValueError: the sizes do not divide, or the rank is none of the world's.
    """

    world_size: int
    sp: int
    rank: int = 0

    def __post_init__(self) -> None:
        if self.sp < 1:
            raise UserError(f"sequence_parallel_size is {self.sp}; it must be at least 1.")
        if self.world_size % self.sp:
            divisors = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0]
            raise UserError(
                f"WORLD_SIZE {self.world_size} (nodes x devices) is no multiple of sequence_parallel_size {self.sp}: "
                f"world = dp x sp must hold. With {counted(self.world_size, 'process', 'processes')} it may be "
                f"{', '.join(map(str, divisors))}."
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not in a world of {self.world_size}.")

    @property
    def dp(self) -> int:
        return self.world_size // self.sp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp

    @property
    def sp_groups(self) -> list[list[int]]:
        """The world's ranks, by SP group."""
        return [list(range(first, first + self.sp)) for first in range(0, self.world_size, self.sp)]
