"""What the ranks measure together: arithmetic, copies, all-gathers, all-to-alls and the optimizer on the host."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .ranks import Ranks

_GATHERED = 2 << 30  # bytes that each rank receives from a collective: about an expert shard of DeepSeek-V3
_COPIED = 1 << 30
_SIZE = 8192  # of the square matrices whose product is timed
_STEPPED = {"cuda": 1 << 26, "cpu": 1 << 20}  # parameters per rank of 16 bytes, far more than caches hold


def _seconds(function: Callable[[], object], device: torch.device, count: int) -> float:
    """Seconds per call, over `count` calls after a first one."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    function()
    wait()
    began = time.perf_counter()
    for _ in range(count):
        function()
    wait()
    return (time.perf_counter() - began) / count


def product(device: torch.device) -> tuple[float, str]:
    """bf16 TFLOP/s of one GPU, and a checksum of the product, equal on all GPUs of a kind."""
    torch.cuda.set_device(device)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(_SIZE, _SIZE, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(2))
    seconds = _seconds(lambda: a @ b, device, 30)
    checksum = int((a @ b).view(torch.int16).long().sum())
    return 2 * _SIZE**3 / seconds / 1e12, f"{checksum & 0xFFFFFFFF:08x}"


def copies(device: torch.device, barrier: Callable[[], None]) -> tuple[float, float]:
    """GB/s of pinned copies to and from the device while all ranks copy."""
    host = torch.empty(_COPIED, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    barrier()
    to_device = _seconds(lambda: there.copy_(host, non_blocking=True), device, 10)
    barrier()
    to_host = _seconds(lambda: host.copy_(there, non_blocking=True), device, 10)
    return _COPIED / to_device / 1e9, _COPIED / to_host / 1e9


def host_optimizer(device: torch.device) -> Callable[[], float]:
    """Builds DeepSpeedCPUAdam, compiling it if needed, and returns its measurement in 1e9 parameters per second of this
    rank; call that on all ranks at once."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameter = torch.nn.Parameter(torch.zeros(_STEPPED[device.type]))
    parameter.grad = torch.ones_like(parameter)
    optimizer = DeepSpeedCPUAdam([parameter], adamw_mode=True)
    optimizer.step()  # allocates the moments
    return lambda: parameter.numel() / _seconds(optimizer.step, torch.device("cpu"), 5) / 1e9


def all_gather(group: dist.ProcessGroup | None, device: torch.device) -> tuple[float, list[int]]:
    """Bus bandwidth per rank in GB/s, and the ranks of the group whose part arrived changed."""
    rank = dist.get_rank(group)
    expected, received = _parts(group, device)
    sent = expected + rank
    return _rate(lambda: dist.all_gather_into_tensor(received.view(-1), sent, group=group), expected, received)


def all_to_all(group: dist.ProcessGroup, device: torch.device) -> tuple[float, list[int]]:
    """GB/s that a rank sends to the others, and the ranks whose part arrived changed."""
    size, rank = group.size(), group.rank()
    expected, received = _parts(group, device)
    sent = (torch.arange(size, dtype=torch.int32, device=device) * size + rank)[:, None] + expected  # to each its own
    return _rate(lambda: dist.all_to_all_single(received, sent, group=group), expected + rank * size, received)


def _parts(group: dist.ProcessGroup | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of which rank r sends those r larger [part], and where all parts arrive [W, part]."""
    size = dist.get_world_size(group)
    part = (_GATHERED if device.type == "cuda" else 1 << 20) // size // 4
    numbers = torch.arange(part, dtype=torch.int32, device=device)
    return numbers, torch.empty(size, part, dtype=torch.int32, device=device)


def _rate(collective: Callable[[], object], expected: torch.Tensor, received: torch.Tensor) -> tuple[float, list[int]]:
    """GB/s from the other ranks, and those of which other numbers arrived than the expected ones plus the rank."""
    seconds = _seconds(collective, received.device, 10 if received.is_cuda else 2)
    wrong = [r for r, got in enumerate(received) if not torch.equal(got - r, expected)]
    return received[1:].nbytes / seconds / 1e9, wrong


def ring(nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of neighbours, each node in at most one pair per round and two pairs total; the all-gather over
    the world measures two nodes."""
    if nodes < 3:
        return []
    rounds: list[list[tuple[int, int]]] = [[], [], []]
    for node in range(nodes):
        rounds[2 if node == nodes - 1 and nodes % 2 else node % 2].append((node, (node + 1) % nodes))
    return [pairs for pairs in rounds if pairs]


def network(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Called by all ranks. GB/s: `world`, `intra`, and by neighbour node `pairs`, of all-gathers; `exchange_intra` and
    `exchange_inter` of all-to-alls in each node, and between its GPUs and those of the same number elsewhere, all at
    once. `wrong`: ranks whose data did not arrive as sent."""
    measured: dict[str, Any] = {"pairs": {}, "wrong": []}
    own, per_node = ranks.rank // ranks.ranks_per_node, ranks.ranks_per_node

    def of_nodes(*nodes: int) -> list[int]:
        return [node * per_node + local for node in nodes for local in range(per_node)]

    if per_node > 1:
        group, _ = dist.new_subgroups_by_enumeration([of_nodes(node) for node in range(ranks.nodes)])
        for name, collective in (("intra", all_gather), ("exchange_intra", all_to_all)):
            measured[name], wrong = collective(group, device)
            measured["wrong"] += [of_nodes(own)[index] for index in wrong]
    for pairs in ring(ranks.nodes):
        mine = next((pair for pair in pairs if own in pair), None)
        for pair in pairs:  # every rank makes every group
            group = dist.new_group(of_nodes(*pair))
            if pair == mine:
                ours = group
        if mine is not None:
            bandwidth, wrong = all_gather(ours, device)
            measured["pairs"][mine[0] + mine[1] - own] = bandwidth
            measured["wrong"] += [of_nodes(*mine)[index] for index in wrong]
        dist.barrier()
    if ranks.nodes > 1:
        measured["world"], wrong = all_gather(None, device)
        measured["wrong"] += wrong
        peers = [list(range(local, ranks.world_size, per_node)) for local in range(per_node)]
        group, _ = dist.new_subgroups_by_enumeration(peers)
        dist.barrier()
        measured["exchange_inter"], wrong = all_to_all(group, device)
        measured["wrong"] += [peers[ranks.rank % per_node][index] for index in wrong]
    return measured
