"""Exchanges between GPUs: the bytes that a rank receives over the bandwidth, and a latency."""

from typing import NamedTuple

from src.planner import rates
from src.planner.cluster import Cluster
from src.planner.settings import Settings
from src.strategies.zero_limits import PIECE


class Exchange(NamedTuple):
    """seconds: alone on the device. nbytes: that a rank receives."""

    seconds: float = 0.0
    nbytes: float = 0.0


def neighbours(settings: Settings, cluster: Cluster, ranks: int, elements: float) -> Exchange:
    """An exchange among consecutive ranks, an SP or EP group; `elements` of the weights' type reach a rank."""
    if ranks == 1:
        return Exchange()
    nbytes = elements * settings.param_bytes
    if cluster.copies:
        return Exchange(nbytes / cluster.copies, nbytes)
    seconds = nbytes / (getattr(cluster, settings.link(ranks)) * 1e9) + rates.latency(ranks)
    return Exchange(seconds, nbytes)


def collective(settings: Settings, cluster: Cluster, ranks: int, nbytes: float, summed: bool = False) -> Exchange:
    """ZeRO's gather, or `summed` reduce-scatter, of so many bytes over `ranks`: the world, or those with equal experts.

    The groups of a node's ranks exchange at once, over the same NICs.
    """
    if ranks == 1:
        return Exchange()
    if cluster.copies:  # of a sum this rank's part alone, which is next to nothing
        return Exchange(0.0 if summed else nbytes / cluster.copies, nbytes)
    stride = settings.world // ranks  # between neighbours of a group
    nodes, groups = settings.nodes // max(1, stride // settings.gpus), min(stride, settings.gpus)
    bandwidth = cluster.nccl_inter_node_gb_s / groups if nodes > 1 else cluster.nccl_intra_node_gb_s
    received = nbytes * (ranks - 1) / ranks
    return Exchange(received / (bandwidth * 1e9) + rates.latency(ranks, nodes), received)


def halves(settings: Settings, cluster: Cluster, elements: float) -> Exchange:
    """All-to-all of experts' gradients in bf16 (`src/strategies/bf16_reduction.py`).

    In two exchanges the pieces overlap: the longer one takes its whole time, the other that of one piece.
    """
    holders, here = settings.holders, min(settings.holders_per_node, settings.holders)
    nodes, nbytes = holders // here, 2 * elements
    if cluster.copies:
        return Exchange(nbytes * ((here > 1) + (nodes > 1)) / cluster.copies, nbytes)
    within = between = 0.0
    if here > 1:
        within = rates.latency(here) + nbytes * (here - 1) / here / (cluster.exchange_intra_node_gb_s * 1e9)
    if nodes > 1:
        between = rates.latency(nodes, nodes)
        between += nbytes / here * (nodes - 1) / nodes / (cluster.exchange_inter_node_gb_s * 1e9)
    seconds = max(within, between) + min(within, between) / max(1, -(-elements // PIECE))
    return Exchange(seconds, nbytes * (holders - 1) / holders)
