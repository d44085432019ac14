"""Which rows go where: tokens sorted by the experts that they have chosen, without a wait for the device.

Legend: T tokens, K experts a token, e experts of a shard, M rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class HostCopy:
    """A small tensor on its way to the host; only who reads it waits for the device."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values, self._arrived = pinned.copy_(values, non_blocking=True), torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


class Route(NamedTuple):
    """Which rows go where. Where tokens have fewer than K experts here, the spare places come last.

    order: [M], the places of [T, K] in expert order. tokens: [M], the token of each row in that order.
    slots: [T, K], where each token's rows stand, M for a spare place. parts: [T, K], in which shard, one behind the
    last for a spare place. offsets: int32 [shards, e], where each expert's rows end in its shard. sizes: [shards],
    each shard's rows.
    """

    order: Tensor
    tokens: Tensor
    slots: Tensor
    parts: Tensor
    offsets: Tensor
    sizes: HostCopy


def route(chosen: Tensor, experts: int, shards: int, sizes: Tensor | None = None) -> Route:
    """Sorts tokens by the experts that they have chosen.

    Args:
        chosen: int64 [T, K], `experts` for a spare place.
        experts, shards: that are here.
        sizes: Route's, where the host knows them; to be given where places are spare.
    """
    top_k = chosen.shape[1]
    by_expert, order = chosen.reshape(-1).sort(stable=True)  # rows of [T*K] in expert order
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=chosen.device)
    if sizes is not None:
        rows = int(sizes.sum())
        order, slots = order[:rows].clone(), slots.clamp_(max=rows)  # a part alone, since it is kept
    numbers = torch.arange(experts, device=chosen.device, dtype=by_expert.dtype)
    ends = torch.searchsorted(by_expert, numbers, right=True).view(shards, -1)  # [shards, e]
    starts = F.pad(ends[:-1, -1], (1, 0))  # [shards]
    offsets = (ends - starts[:, None]).int()
    parts = chosen // (experts // shards)
    sizes = offsets[:, -1] if sizes is None else sizes
    return Route(order, order // top_k, slots.view_as(chosen), parts, offsets, HostCopy(sizes))
