"""Which rows go where: tokens sorted by the experts that they have chosen, without a wait for the device.

Legend: T tokens, K experts a token, e experts of a shard, M rows.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .channel import Coming


class HostCopy:
    """A small tensor on its way to the host; only who reads it waits for the device."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._source = values  # not to be freed before the copy, which may be on another stream than its own
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values, self._arrived = pinned.copy_(values, non_blocking=True), torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
            self._source = self._values
        return self._values


def host_copy(coming: Coming, device: torch.device) -> HostCopy:
    """Of what is under way; the stream that computes goes on."""
    if device.type != "cuda":
        return HostCopy(coming.wait())
    with torch.cuda.stream(_aside(device)):
        return HostCopy(coming.wait())


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Route(NamedTuple):
    """Which rows go where, int32. Where tokens have fewer than K experts here, the spare places come last.

    order: [M], the places of [T, K] in expert order. tokens: [M], the token of each row in that order.
    slots: [T, K], where each token's rows stand, M for a spare place. parts: [T, K], in which shard, one behind the
    last for a spare place. offsets: [shards, e], where each expert's rows end in its shard. sizes: [shards], each
    shard's rows.
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
        chosen: integers [T, K], `experts` for a spare place.
        experts, shards: that are here.
        sizes: Route's, where the host knows them; to be given where places are spare.
    """
    top_k = chosen.shape[1]
    by_expert, places = chosen.reshape(-1).sort(stable=True)  # rows of [T*K] in expert order
    slots = torch.empty(len(places), dtype=torch.int32, device=chosen.device)
    slots[places] = torch.arange(len(places), dtype=torch.int32, device=chosen.device)
    if sizes is not None:
        rows = int(sizes.sum())
        places, slots = places[:rows], slots.clamp_(max=rows)
    numbers = torch.arange(experts, device=chosen.device, dtype=by_expert.dtype)
    ends = torch.searchsorted(by_expert, numbers, right=True).view(shards, -1)  # [shards, e]
    starts = F.pad(ends[:-1, -1], (1, 0))  # [shards]
    offsets = (ends - starts[:, None]).int()
    parts = (chosen // (experts // shards)).int()
    sizes = offsets[:, -1] if sizes is None else sizes
    return Route(places.int(), (places // top_k).int(), slots.view_as(chosen), parts, offsets, HostCopy(sizes))
