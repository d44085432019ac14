"""ZeRO-3's gathers and reductions as DeepSpeed 0.19.8 orders them: what is fetched ahead, what is copied, what waits.

Follows `PartitionedParameterCoordinator.fetch_sub_module` and `release_sub_module`,
`DeepSpeedZeroOptimizer_Stage3.__reduce_and_partition_ipg_grads` and `src/strategies/zero3_collectives.py`. The host
runs ahead of the device; it waits for a gather where more than two are under way, and for a reduction likewise, and
what it has not come to cannot start.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from src.planner import rates
from src.planner.cluster import Cluster
from src.planner.ledger import GRADIENTS, SHARDS, Line
from src.planner.schedule import Schedule
from src.planner.settings import Settings
from src.planner.steps import Visit
from src.planner.streams import CAST, FROM_HOST, GATHER, REDUCE, TO_HOST
from src.strategies.zero_limits import OWN_MEMORY, PIECE, reduced_in_pieces, zero3_limits

EVENTS = 2  # gathers, and reductions, that may be unfinished when the host comes to the next
NORM_ELEMENTS = 250_000_000  # whose norm is taken at once (`_constant_buffered_norm2`)


def collective_seconds(settings: Settings, cluster: Cluster, nbytes: float, shared: bool = False) -> float:
    """A gather or reduce-scatter: bytes x (N - 1) / N over the bus bandwidth, and a ring's latency.

    shared: over the ranks that have the same experts. The groups of a node's ranks do so at once, over the same NICs.
    """
    s = settings
    ranks, nodes, groups = (
        (s.holders, s.nodes // max(1, s.ep // s.gpus), min(s.ep, s.gpus)) if shared else (s.world, s.nodes, 1)
    )
    if ranks == 1:
        return 0.0
    bandwidth = cluster.nccl_inter_node_gb_s / groups if nodes > 1 else cluster.nccl_intra_node_gb_s
    latency = rates.COLLECTIVE + rates.COLLECTIVE_NODE * nodes + rates.COLLECTIVE_RANK * ranks
    return nbytes * (ranks - 1) / ranks / (bandwidth * 1e9) + latency


def halved_seconds(settings: Settings, cluster: Cluster, elements: float) -> float:
    """All-to-all of experts' gradients (`src/strategies/bf16_reduction.py`).

    In two exchanges the pieces overlap: the longer one takes its whole time, the other that of one piece.
    """
    here = min(settings.holders_per_node, settings.holders)
    nodes = settings.holders // here
    within = between = 0.0
    if here > 1:
        within = rates.COLLECTIVE + rates.COLLECTIVE_RANK * here
        within += 2 * elements * (here - 1) / here / (cluster.exchange_intra_node_gb_s * 1e9)
    if nodes > 1:
        between = rates.COLLECTIVE + (rates.COLLECTIVE_NODE + rates.COLLECTIVE_RANK) * nodes
        between += 2 * elements / here * (nodes - 1) / nodes / (cluster.exchange_inter_node_gb_s * 1e9)
    return max(within, between) + min(within, between) / max(1, -(-elements // PIECE))


@dataclass
class _Group:
    """Parameters gathered by one collective; the small ones are copied out of a flat buffer, which their copy frees."""

    op: int
    flat: str | None
    small: tuple[str, ...]


class Zero:
    """Adds the operations of gathers and reductions to a schedule, visit by visit, and keeps its ledger.

    Args:
        order: every visit of the micro-step, as DeepSpeed has recorded it.
        last_micro_step: of the optimizer step.
    """

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        order: Sequence[Visit],
        schedule: Schedule,
        last_micro_step: bool = True,
    ) -> None:
        self.settings, self.cluster, self.order, self.last_micro_step = settings, cluster, order, last_micro_step
        self.schedule, self.ledger = schedule, schedule.ledger
        s = settings.sizes
        limits = zero3_limits(sum(s.shard.values()) if s.layers > s.first_k_dense_replace else s.embedding)
        self._prefetch_size = limits["stage3_prefetch_bucket_size"]
        self._max_live = limits["stage3_max_live_parameters"]
        self._alone = settings.world == 1
        self._experts = {name for visit in order if visit.experts for name in visit.params}
        self._shared = self._experts if settings.ep > 1 else set[str]()
        self._aliased = (self._alone and not settings.offload_parameters) or settings.stage < 3
        self._queue = deque((name, size, i) for i, visit in enumerate(order) for name, size in visit.params.items())
        self._step = 0
        self._available: dict[str, int] = {}  # parameters that are gathered or under way
        self._groups: dict[str, _Group] = {}
        self._fetched_for: dict[str, int] = {}
        self._bucket: list[tuple[str, int, int]] = []  # name, elements, operation that made it
        self._copies = 0
        self._released: tuple[int, ...] = ()
        self._arrivals: list[int] = []  # the operations behind the waits for parameters, and behind
        self._reductions: list[int] = []  # reductions, for which the host comes to wait

    # -- weights ------------------------------------------------------------------------------------------------------

    def fetch(self, visit: Visit) -> tuple[int, ...]:
        """Gathers what the visit needs and is not there, then prefetches; returns what its computation waits for."""
        assert self.order[self._step] is visit
        a_parameter = rates.HOST_PARAMETER_ALONE if self._aliased else rates.HOST_PARAMETER
        self.schedule.host_works(a_parameter * len(visit.params) + visit.host)
        if self._aliased:
            self._step += 1
            return (self.schedule.host,)
        self._gather({name: n for name, n in visit.params.items() if name not in self._available}, visit.name)
        waits = tuple(self._arrive(name) for name in visit.params if name in self._groups)
        fresh = {name for name in visit.params if self._fetched_for.get(name, -1) < self._step}
        while self._queue and fresh:
            name, _, step = self._queue.popleft()
            self._fetched_for[name] = step
            assert name in fresh, f"{name} is not what {visit.name} needs next"
            fresh.discard(name)
        self._prefetch()
        self._step += 1
        return (*waits, self.schedule.host)

    def _ranks(self, name: str) -> int:
        """Over which a parameter is partitioned."""
        return self.settings.holders if name in self._shared else self.settings.world

    def _in_place(self, name: str) -> bool:
        """Whether a parameter is used where it lies: an expert that no other rank has."""
        return self._ranks(name) == 1 and not self._alone and not self.settings.offload_parameters

    def _collective(self, params: Mapping[str, int], each: int) -> float:
        """Seconds of one collective per group, `each` bytes an element."""
        sizes = {False: 0, True: 0}
        for name, n in params.items():
            sizes[name in self._shared] += n
        return sum(collective_seconds(self.settings, self.cluster, each * n, of) for of, n in sizes.items() if n)

    def _back_pressure(self, events: list[int]) -> None:
        if len(events) > EVENTS:
            self.schedule.host_works(0.0, events[-1 - EVENTS])

    def _prefetch(self) -> None:
        limit = min(self._max_live - sum(self._available.values()), self._prefetch_size)
        ahead: dict[str, int] = {}
        while self._queue and sum(ahead.values()) < limit:
            name, size, step = self._queue.popleft()
            self._fetched_for[name] = max(self._fetched_for.get(name, -1), step)
            if name not in self._available:
                ahead[name] = size
        self._gather(ahead, f"prefetched: {next(iter(ahead), '')}")

    def _gather(self, params: Mapping[str, int], what: str) -> None:
        if not params:
            return
        add, settings = self.schedule.add, self.settings
        # The stream that gathers waits for the computation that used the last memory to be released.
        after: tuple[int, ...] = (self.schedule.host, *self._released)
        small = {
            name: n for name, n in params.items() if n * settings.param_bytes < OWN_MEMORY and not self._in_place(name)
        }
        flat = None
        if not self._alone and len(small) > 1:
            self._copies += 1
            flat = f"flat {self._copies}"
            nbytes = settings.param_bytes * sum(small.values())
            why = f"{nbytes / 1e9:.2f} GB under way, gathered together: {next(iter(small))} ..."
            self.ledger.take(flat, Line(SHARDS, nbytes, why))
        else:
            small = {}
        for name, n in params.items():
            if name not in small:
                self._take(name, n)
        if settings.offload_parameters:
            size = settings.param_bytes * sum(n / self._ranks(name) for name, n in params.items())
            after = (add(FROM_HOST, size / (self.cluster.pcie_in_gb_s * 1e9), f"partitions of {what}", *after),)
        if not self._alone:
            after = (add(GATHER, self._collective(params, settings.param_bytes), f"gather {what}", *after),)
        group = _Group(after[0], flat, tuple(small))
        self._available |= params
        self._groups |= dict.fromkeys(params, group)
        for name, n in params.items():
            if name in self._shared:
                self.schedule.shared_gathered += n
            else:
                self.schedule.gathered += n

    def _take(self, name: str, n: int) -> None:
        nbytes = 0 if self._in_place(name) else n * self.settings.param_bytes
        self.ledger.take(name, Line(SHARDS, nbytes, f"{n / 1e6:.0f}e6 elements of {name}"))

    def _arrive(self, name: str) -> int:
        """Waits for a parameter's gather. The first of a group has the small ones copied out of the flat buffer."""
        self._back_pressure(self._arrivals)
        group = self._groups.pop(name)
        self._arrivals.append(group.op)
        if group.flat is not None:
            for other in group.small:
                self._take(other, self._available[other])
                self.schedule.stolen += 2 * self._available[other] * self.settings.param_bytes / self.cluster.copy
            self.ledger.give(group.flat)
            group.flat = None
        return group.op

    def release(self, visit: Visit, done: int) -> None:
        """Frees a visit's weights, which `done` has used, but those whose next use a prefetch has passed over."""
        if self._aliased:
            return
        for name in visit.params:
            if name in self._available and name not in self._groups and self._fetched_for[name] <= self._step - 1:
                del self._available[name]
                self._released = (done,)
                self.ledger.give(name)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def gradients(self, visit: Visit, made_by: int) -> None:
        """The visit's weight gradients exist; those that overfill the bucket send the ones before on their way.

        What is `beside` of the computation is still there when the gradients are, and gone when they are reduced.
        """
        made = {name: int(n * self.settings.trained) for name, n in visit.params.items()}
        for name, n in made.items():
            why = f"{n / 1e6:.0f}e6 elements, gradient of {name}"
            self.ledger.take(f"d {name}", Line(GRADIENTS, n * self.settings.param_bytes, why))
        if visit.beside is not None:
            self.ledger.passing(visit.beside)
        for name, n in made.items():
            filled = sum(m for _, m, _ in self._bucket)
            mixed = bool(self._bucket) and self._ranks(self._bucket[0][0]) != self._ranks(name)
            if self._bucket and (mixed or filled + n > self.settings.reduce_bucket):
                self._reduce()
                filled = 0
            self._bucket.append((name, n, made_by))

    def flush(self) -> None:
        if self._bucket:
            self._reduce()

    def _reduce(self) -> None:
        """Casts a bucket to fp32, reduces and scatters it, and adds this rank's part to the accumulated gradient."""
        settings, cluster, add = self.settings, self.cluster, self.schedule.add
        self._back_pressure(self._reductions)
        n, first = sum(m for _, m, _ in self._bucket), self._bucket[0][0]
        self.ledger.passing(self._copies_of_a_bucket(n, first))
        # Cast, reduction and sum of one bucket end before the next one's begin: they share a stream.
        made = (*{op for _, _, op in self._bucket}, *self._reductions[-1:], self.schedule.host)
        ranks = self._ranks(first)
        own = 4 * n / ranks
        # Cast, division and layout by rank in one pass, or layout and sum in bf16: as many bytes. Of a gradient in
        # pieces all but the first beside the reduction.
        cast = (settings.param_bytes + 4) / cluster.copy
        begun = min(n, PIECE) if self._in_pieces(n) else n
        last = add(CAST, cast * begun, f"cast gradient of {first}", *made)
        self.schedule.stolen += cast * n + (0 if settings.offload_optimizer else 3 * own / cluster.copy)
        half = self._half()
        if ranks > 1:
            seconds = halved_seconds(settings, cluster, half) if half else 0.0
            seconds += self._collective({first: n - half}, 4) if n > half else 0.0
            last = add(REDUCE, seconds, f"reduce gradient of {first}", last)
        accumulated = f"accumulated gradient of {first}"
        if settings.offload_optimizer:
            # The accumulated gradient is in host memory: fetched, added to and put back, and once more at the end.
            out = own * (2 if self.last_micro_step else 1)
            last = add(FROM_HOST, own / cluster.pcie_in_gb_s / 1e9, accumulated, last)
            last = add(TO_HOST, out / cluster.pcie_out_gb_s / 1e9, accumulated, last)
        else:
            last = add(CAST, 3 * own / cluster.copy, accumulated, last)
        for name, _, _ in self._bucket:
            self.ledger.give(f"d {name}")
        self._reductions.append(last)
        self._bucket = []
        self.schedule.halved += half
        if first in self._shared:
            self.schedule.shared_reduced += n
        else:
            self.schedule.reduced += n

    def _in_pieces(self, n: int) -> bool:
        if len(self._bucket) > 1:
            return False
        return n > PIECE if self._half() else reduced_in_pieces(n, self._ranks(self._bucket[0][0]))

    def _half(self) -> int:
        """Elements of the bucket that travel in bf16."""
        return sum(m for name, m, _ in self._bucket if name in self._experts) if self.settings.halves else 0

    def _copies_of_a_bucket(self, n: int, first: str) -> Line:
        """What its reduction allocates: its elements in fp32, or two pieces of them and this rank's part."""
        settings = self.settings
        alone = len(self._bucket) == 1 and settings.param_bytes == 4  # overwritten
        nbytes = 0.0 if alone else 4.0 * n
        why = f"fp32 copy of the gradient of {first}, {n / 1e6:.0f}e6 elements x 4 bytes"
        if self._in_pieces(n):
            nbytes = 4.0 * (2 * PIECE + n / self._ranks(first))
            why = f"fp32 copies of the gradient of {first}: two pieces of {PIECE / 1e6:.0f}e6 elements x 4 bytes"
        if half := self._half():
            piece = min(half, PIECE) if self._in_pieces(n) else half
            here = settings.holders_per_node if 1 < settings.holders_per_node < settings.holders else 0
            sums = 12 * piece / here if here else 0  # a node's sum in fp32 and bf16, two pieces on their way between
            nbytes = 4 * min(half, 2 * piece) + sums + 4 * (n - half + half / settings.holders)
            why = f"gradient of {first}: {min(half, 2 * piece) / 1e6:.0f}e6 elements x 2 bytes, sent and received"
        if settings.offload_optimizer:  # the accumulated gradient comes to the device, and its norm is taken in fp64
            largest = max(m for _, m, _ in self._bucket) / self._ranks(first)
            nbytes += 4 * largest + 8 * min(largest, NORM_ELEMENTS)
            why += f", and {largest / 1e6:.0f}e6 accumulated x 4 bytes with their norm's fp64 copy"
        return Line(GRADIENTS, nbytes, why)
