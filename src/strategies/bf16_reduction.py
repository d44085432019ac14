"""`reduce_scatter` of bf16 gradients at half the bytes: they travel as autograd made them, and are summed in fp32.

A ring that reduces in bf16 rounds at every hop. All-to-all moves as many bytes per GPU and leaves the sums to the
receiver, where at most one per node is rounded:

| ranks that have the same expert | exchanges | rounded |
| --- | --- | --- |
| one on each node, or all on one | among them | nothing |
| G on each of M nodes | within the node; then between the nodes' ranks of the same number | each node's sum, once |

One exchange over all ranks would round nothing either, and send G times as much through each network card.

A large gradient goes in pieces. While one piece is exchanged between the nodes, the next one is within them. Sums are
of one kernel over ranks in their order, so that equal gradients give equal bits.

Legend: rank m G + l of W is number l of G on node m of M; n elements of a rank's part of one gradient, N of a bucket's.
"""

import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from src.errors import UserError

from . import zero_limits
from .parallel_dims import ParallelDims

# Settings of DeepSpeed with reductions of their own, with the values that turn them off.
_OTHERS: dict[str, Any] = {"zero_quantized_gradients": False, "zenflow": None}


class BF16Reduction:
    """Reduces the bf16 gradients of some parameters.

    Args:
        groups: of the one exchange; or of the two, first within the node.
        parameters: whose gradients, by `ds_id`.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup], parameters: set[int]) -> None:
        self._groups, self._parameters = groups, parameters
        self._world = math.prod(group.size() for group in groups)

    def takes(self, parameter: Any) -> bool:
        """Whether a ZeRO-3 parameter's gradient is reduced here."""
        return parameter.ds_id in self._parameters and parameter.grad.dtype == torch.bfloat16 and self._world > 1

    @torch.no_grad()
    def reduce_scatter(self, gradients: Sequence[Tensor], rank: int, divisor: int) -> list[Tensor]:
        """Sums gradients over the ranks and divides them; returns this rank's part of each, fp32 and flattened.

        A part has ceil(numel / W) elements, fewer or none where the tensor ends.
        """
        sizes = [math.ceil(g.numel() / self._world) for g in gradients]
        total, peers = sum(sizes), self._groups[0].size()
        columns = total if len(gradients) > 1 else max(1, zero_limits.PIECE // self._world)
        out = gradients[0].new_empty(total, dtype=torch.float32)  # [N]
        pieces = list[Iterator[bool]]()
        for begin in range(0, total, columns):
            part = out[begin : begin + columns]
            rows = gradients[0].new_empty(peers, self._world // peers, len(part))  # [G, M, c]
            widths = sizes if len(gradients) > 1 else [len(part)]
            for places, gradient, n in zip(rows.split(widths, 2), gradients, sizes, strict=True):
                _lay_out(places, gradient, n, begin)
            pieces = _advance([self._piece(rows, part, divisor), *pieces])
            del rows
        while pieces:
            pieces = _advance(pieces)
        own = [max(0, min(n, g.numel() - rank * n)) for g, n in zip(gradients, sizes, strict=True)]
        return [part[:n] for part, n in zip(out.split(sizes), own, strict=True)]

    def _piece(self, rows: Tensor, out: Tensor, divisor: int) -> Iterator[bool]:
        """Takes rows [G, M, c] to their sum, out [c]. Pauses while they are on their way: once per exchange."""
        for group in self._groups:
            received = torch.empty_like(rows)
            work = dist.all_to_all_single(received, rows, group=group, async_op=True)
            yield True
            work.wait()
            if group is not self._groups[-1]:
                rows = received.sum(0, dtype=torch.float32).to(rows.dtype)  # [M, c]
        torch.sum(received.flatten(1), 0, dtype=torch.float32, out=out).div_(divisor)


def _advance(pieces: list[Iterator[bool]]) -> list[Iterator[bool]]:
    """Takes each piece to its next pause, the newest, which comes first, before older ones: its exchange is then on its
    way while they are summed. Returns those that are not done."""
    return [piece for piece in pieces if next(piece, False)]


def _lay_out(rows: Tensor, gradient: Tensor, size: int, begin: int) -> None:
    """Writes elements [begin, begin + c) of the part of each rank m G + l to rows[l, m]; size: n, of a whole part."""
    flat, stop, peers = gradient.reshape(-1), begin + rows.shape[2], len(rows)
    whole, rest = divmod(len(flat), size)  # whole parts; elements of the last one
    nodes, ranks = divmod(whole, peers)
    if nodes:
        parts = flat[: nodes * peers * size].view(nodes, peers, size)
        rows[:, :nodes].copy_(parts[:, :, begin:stop].transpose(0, 1))
    if ranks:
        rows[:ranks, nodes].copy_(flat[nodes * peers * size : whole * size].view(ranks, size)[:, begin:stop])
    if rest > begin:
        last = flat[whole * size + begin : whole * size + min(rest, stop)]
        rows[ranks, nodes, : len(last)].copy_(last)


def make_groups(
    dims: ParallelDims, same: dist.ProcessGroup, timeout: timedelta | None = None
) -> list[dist.ProcessGroup]:
    """The groups of a `BF16Reduction` over `same`, the ranks that have this rank's experts. To be called by all ranks.

    Raises:
        ValueError: nodes have different numbers of processes.
    """
    sizes: list[Any] = [None] * dims.world_size
    dist.all_gather_object(sizes, dims.per_node)
    check_nodes(sizes)
    if dims.holders_per_node in (1, same.size()):
        return [same]
    groups = (dims.expert_node_groups, dims.expert_peer_groups)
    return [dist.new_subgroups_by_enumeration(ranks, timeout=timeout)[0] for ranks in groups]


def check_nodes(sizes: Sequence[int]) -> None:
    """Raises ValueError unless all nodes have equally many processes; sizes: of each rank's node."""
    if len(set(sizes)) > 1 or len(sizes) % sizes[0]:
        other = next((rank for rank, size in enumerate(sizes) if size != sizes[0]), None)
        also = "" if other is None else f", that of rank {other} {sizes[other]}"
        raise UserError(
            f"reduce_dtype bf16 needs nodes of equally many processes: that of rank 0 has {sizes[0]}{also}, WORLD_SIZE "
            f"is {len(sizes)}. Start as many on every node, or set reduce_dtype fp32."
        )


def check_zero(config: dict[str, Any]) -> None:
    """Raises ValueError for settings of DeepSpeed under which its own reduction is taken."""
    factor = config.get("gradient_predivide_factor", 1.0)
    more = [] if factor == 1.0 else [f"gradient_predivide_factor {factor}"]
    zero_limits.check_goes_with("reduce_dtype bf16", config.get("zero_optimization", {}), _OTHERS, more)
