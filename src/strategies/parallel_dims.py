"""Rank arithmetic: the one place that knows how data-, sequence- and expert-parallel ranks relate."""

from dataclasses import dataclass

from src.errors import UserError
from src.units import counted


@dataclass(frozen=True)
class ParallelDims:
    """world = dp x sp = expert-dp x ep. Ranks of an SP or EP group are consecutive: it stays in a node where it fits.

    Experts see tokens, not sequences, so neither of SP and EP need divide the other.

    Args:
        ep: ranks that share the experts of a layer; ranks ep apart hold the same.
        per_node: ranks of a node; None takes the world for one.

    Raises:
        ValueError: the sizes do not divide, or the rank is none of the world's.
    """

    world_size: int
    sp: int
    rank: int = 0
    ep: int = 1
    per_node: int | None = None

    def __post_init__(self) -> None:
        if self.sp < 1:
            raise UserError(f"sequence_parallel_size is {self.sp}; it must be at least 1.")
        if self.world_size % self.sp:
            divisors = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0]
            raise UserError(
                f"WORLD_SIZE {self.world_size} (nodes x devices) is not a multiple of sequence_parallel_size "
                f"{self.sp}: world = dp x sp must hold. With "
                f"{counted(self.world_size, 'process', 'processes')} it may be {', '.join(map(str, divisors))}."
            )
        self.check_experts(None)
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
        return _consecutive(self.world_size, self.sp)

    @property
    def ep_groups(self) -> list[list[int]]:
        """The world's ranks, by EP group: each has all experts once."""
        return _consecutive(self.world_size, self.ep)

    @property
    def expert_dp_groups(self) -> list[list[int]]:
        """The world's ranks, by the experts that they share: ZeRO-3 partitions these over such a group."""
        return [list(range(first, self.world_size, self.ep)) for first in range(self.ep)]

    @property
    def holders_per_node(self) -> int:
        """Ranks of a node that have the same experts."""
        return max(1, (self.per_node or self.world_size) // self.ep)

    @property
    def expert_node_groups(self) -> list[list[int]]:
        """`expert_dp_groups`, cut by nodes."""
        size = self.holders_per_node
        return [ranks[i : i + size] for ranks in self.expert_dp_groups for i in range(0, len(ranks), size)]

    @property
    def expert_peer_groups(self) -> list[list[int]]:
        """`expert_dp_groups`, cut by a rank's number on its node."""
        size = self.holders_per_node
        return [ranks[i::size] for ranks in self.expert_dp_groups for i in range(size)]

    @property
    def leaves_node(self) -> bool:
        """Whether an EP group spans nodes, and tokens their network."""
        return self.ep > (self.per_node or self.world_size)

    def check_experts(self, experts: int | None) -> None:
        """Raises ValueError where ep does not suit the world, its nodes, or the experts of a layer; None: not known."""
        node = self.per_node or self.world_size

        def suits(n: int) -> bool:
            return self.world_size % n == 0 and (node % n == 0 or n % node == 0) and (experts or n) % n == 0

        if self.ep < 1 or not suits(self.ep):
            known = "" if experts is None else f" and the {experts} experts of a layer"
            sizes = ", ".join(str(n) for n in range(1, self.world_size + 1) if suits(n))
            raise UserError(
                f"expert_parallel_size {self.ep} must divide the {node} processes of a node, or be whole nodes, and "
                f"divide WORLD_SIZE {self.world_size}{known}. It may be {sizes}."
            )


def _consecutive(world_size: int, size: int) -> list[list[int]]:
    return [list(range(first, first + size)) for first in range(0, world_size, size)]
