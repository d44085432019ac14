"""ZeRO-3's gathers and reductions as DeepSpeed 0.19.8 orders them: what is fetched ahead, what is copied, what waits.

Follows `PartitionedParameterCoordinator.fetch_sub_module` and `release_sub_module`, `AllGatherCoalescedHandle.wait`
and `DeepSpeedZeroOptimizer_Stage3.__reduce_and_partition_ipg_grads`. The host runs ahead of the device; it waits for a
gather where more than two are under way, and for a reduction likewise, and what it has not come to cannot start.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from src.planner.cluster import Cluster
from src.planner.ledger import Item, Ledger
from src.planner.rates import MEMORY, PRODUCTS_BESIDE
from src.planner.settings import Settings
from src.planner.streams import CAST, FROM_HOST, GATHER, HOST, REDUCE, TO_HOST, Op

SHARDS = "gathered weights"
GRADIENTS = "whole gradients"
EVENTS = 2  # gathers, and reductions, that may be unfinished when the host comes to the next
NORM_ELEMENTS = 250_000_000  # whose norm is taken at once (`_constant_buffered_norm2`)
HOOKS = 0.4e-3  # seconds of the host for a visit of one parameter: hooks, allocator, launches


@dataclass(frozen=True)
class Visit:
    """One call of a module: its parameters as (name, elements), its compute time, and what happens around it.

    backward: its weights' gradients come out. beside: as `Op`'s.
    """

    name: str
    params: tuple[tuple[str, int], ...]
    seconds: float
    backward: bool = False
    beside: tuple[float, float] = PRODUCTS_BESIDE


def collective_seconds(settings: Settings, cluster: Cluster, nbytes: float) -> float:
    """A gather or reduce-scatter over all ranks: bytes x (N - 1) / N over the bus bandwidth, and a ring's latency."""
    world = settings.world
    if world == 1:
        return 0.0
    bandwidth = cluster.nccl_inter_node_gb_s if settings.nodes > 1 else cluster.nccl_intra_node_gb_s
    return nbytes * (world - 1) / world / (bandwidth * 1e9) + 20e-6 + 5e-6 * settings.nodes + 1e-6 * world


@dataclass
class _Group:
    """Parameters gathered by one collective; copied out of its flat buffer, which the last of them frees."""

    op: int
    waiting: set[str]
    flat: str | None
    copied: bool = False


@dataclass
class Zero:
    """Emits the operations of gathers and reductions while the schedule is built, and keeps the ledger.

    order: every visit of the micro-step, as DeepSpeed has recorded it.
    """

    settings: Settings
    cluster: Cluster
    order: Sequence[Visit]
    ops: list[Op]
    ledger: Ledger
    last_micro_step: bool = True
    _step: int = 0
    _available: dict[str, int] = field(default_factory=dict)  # parameters that are gathered or under way
    _groups: dict[str, _Group] = field(default_factory=dict)
    _fetched_for: dict[str, int] = field(default_factory=dict)
    _bucket: list[tuple[str, int, int]] = field(default_factory=list)  # name, elements, operation that made it
    _copies: int = 0
    _arrivals: list[int] = field(default_factory=list)  # the operations behind the waits for parameters, and behind
    _reductions: list[int] = field(default_factory=list)  # reductions, for which the host comes to wait
    host: int = -1  # the host's last operation
    stolen: float = 0.0  # seconds of casts and copies on the device since the computation last paid for them
    gathered: float = 0.0  # elements, for the report
    reduced: float = 0.0

    def __post_init__(self) -> None:
        shard = sum(self.settings.sizes.shard) if self.settings.sizes.layers > self.settings.sizes.dense else 0
        shard = shard or self.settings.sizes.embedding
        given = self.settings
        # As strategies/parallelize.py sets them, which a test compares.
        self.prefetch = shard + shard // 8
        self.max_live = 2 * shard + shard // 2
        self._queue = deque((name, size, i) for i, visit in enumerate(self.order) for name, size in visit.params)
        self._alone = given.world == 1
        self._aliased = (self._alone and not given.offload_parameters) or given.stage < 3

    # -- weights ------------------------------------------------------------------------------------------------------

    def fetch(self, visit: Visit) -> tuple[int, ...]:
        """Gathers what the visit needs and is not there, then prefetches; returns what its computation waits for."""
        assert self.order[self._step] is visit
        self.host_works(HOOKS * len(visit.params))
        if self._aliased:
            self._step += 1
            return (self.host,)
        missing = [param for param in visit.params if param[0] not in self._available]
        self._gather(missing, visit.name)
        waits = tuple(self._arrive(name) for name, _ in visit.params if name in self._groups)
        fresh = {name for name, _ in visit.params if self._fetched_for.get(name, -1) < self._step}
        while self._queue and fresh:
            name, _, step = self._queue.popleft()
            self._fetched_for[name] = step
            assert name in fresh, f"{name} is not what {visit.name} needs next"
            fresh.discard(name)
        self._prefetch()
        self._step += 1
        return (*waits, self.host)

    def host_works(self, seconds: float, *after: int) -> None:
        """The host, which does one thing after the other, waits for operations and works."""
        self.ops.append(Op(HOST, seconds, "host", after))
        self.host = len(self.ops) - 1

    def _back_pressure(self, events: list[int]) -> None:
        if len(events) > EVENTS:
            self.host_works(0.0, events[-1 - EVENTS])

    def _prefetch(self) -> None:
        limit = min(self.max_live - sum(self._available.values()), self.prefetch)
        ahead: list[tuple[str, int]] = []
        while self._queue and sum(size for _, size in ahead) < limit:
            name, size, step = self._queue.popleft()
            self._fetched_for[name] = max(self._fetched_for.get(name, -1), step)
            if name not in self._available and (name, size) not in ahead:
                ahead.append((name, size))
        if ahead:
            self._gather(ahead, "prefetched: " + ahead[0][0])

    def _gather(self, params: Sequence[tuple[str, int]], what: str) -> None:
        if not params:
            return
        after: tuple[int, ...] = (self.host,)
        size = self.settings.param_bytes * sum(n for _, n in params)
        flat = None
        if not self._alone and len(params) > 1:
            self._copies += 1
            flat = f"flat {self._copies}"
            self.ledger.take(
                flat, SHARDS, size, f"{size / 1e9:.2f} GB under way, gathered together: {params[0][0]} ..."
            )
        else:
            for name, n in params:
                nbytes = n * self.settings.param_bytes
                self.ledger.take(name, SHARDS, nbytes, f"{n / 1e6:.0f}e6 elements of {name}")
        if self.settings.offload_parameters:
            rate = self.cluster.pcie_in_gb_s * 1e9
            self.ops.append(Op(FROM_HOST, size / self.settings.world / rate, f"partitions of {what}", after))
            after = (len(self.ops) - 1,)
        if not self._alone:
            self.ops.append(Op(GATHER, collective_seconds(self.settings, self.cluster, size), f"gather {what}", after))
        group = _Group(len(self.ops) - 1, {name for name, _ in params}, flat)
        for name, n in params:
            self._available[name] = n
            self._groups[name] = group
        self.gathered += sum(n for _, n in params)

    def _arrive(self, name: str) -> int:
        """Waits for a parameter's gather. The first of a group has them all copied out of the flat buffer."""
        self._back_pressure(self._arrivals)
        group = self._groups.pop(name)
        self._arrivals.append(group.op)
        if group.flat is not None and not group.copied:
            for other in group.waiting:
                nbytes = self._available[other] * self.settings.param_bytes
                self.ledger.take(other, SHARDS, nbytes, f"{self._available[other] / 1e6:.0f}e6 elements of {other}")
                self.stolen += 2 * nbytes / MEMORY
            group.copied = True
        group.waiting.discard(name)
        if not group.waiting and group.flat is not None:
            self.ledger.give(group.flat)
        return group.op

    def release(self, visit: Visit) -> None:
        """Frees a visit's weights, but those whose next use a prefetch has passed over."""
        if self._aliased:
            return
        for name, _ in visit.params:
            if name in self._available and name not in self._groups and self._fetched_for[name] <= self._step - 1:
                del self._available[name]
                self.ledger.give(name)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def gradients(self, visit: Visit, made_by: int, beside: Item | None = None) -> None:
        """The visit's weight gradients exist; those that overfill the bucket send the ones before on their way.

        beside: what is still there of the computation when the gradients are, and gone when they are reduced.
        """
        made = [(name, int(n * self.settings.trained)) for name, n in visit.params]
        for name, n in made:
            nbytes = n * self.settings.param_bytes
            self.ledger.take(f"d {name}", GRADIENTS, nbytes, f"{n / 1e6:.0f}e6 elements, gradient of {name}")
        if beside is not None:
            self.ledger.passing("beside", beside.group, beside.nbytes, beside.why)
        for name, n in made:
            if self._bucket and sum(m for _, m, _ in self._bucket) + n > self.settings.reduce_bucket:
                self._reduce()
            if sum(m for _, m, _ in self._bucket) + n <= self.settings.reduce_bucket:
                self.ledger.give(f"d {name}")  # copied into the bucket's own memory
            self._bucket.append((name, n, made_by))

    def flush(self) -> None:
        if self._bucket:
            self._reduce()

    def _reduce(self) -> None:
        """Casts a bucket to fp32, reduces and scatters it, and adds this rank's part to the accumulated gradient."""
        settings, cluster = self.settings, self.cluster
        self._back_pressure(self._reductions)
        n = sum(m for _, m, _ in self._bucket)
        inside = n <= settings.reduce_bucket  # gradients in the bucket's memory are fp32 already
        what = f"fp32 copy of the gradient of {self._bucket[0][0]}, {n / 1e6:.0f}e6 elements x 4 bytes"
        passing = 4.0 * n if not inside or (len(self._bucket) > 1 and settings.world > 1) else 0.0
        if settings.offload_optimizer:  # the accumulated gradient comes to the device, and its norm is taken in fp64
            largest = max(m for _, m, _ in self._bucket) / settings.world
            passing += 4 * largest + 8 * min(largest, NORM_ELEMENTS)
            what += f", and {largest / 1e6:.0f}e6 accumulated x 4 bytes with their norm's fp64 copy"
        self.ledger.passing("fp32 gradient", GRADIENTS, passing, what)
        # Cast, reduction and sum of one bucket end before the next one's begin: they share a stream.
        made = (*{op for _, _, op in self._bucket}, *self._reductions[-1:], self.host)
        name = f"gradient of {self._bucket[0][0]}"
        # Cast and, in place, the division before the sum: 2 + 4 + 8 bytes an element.
        self.ops.append(Op(CAST, 14 * n / MEMORY, f"cast {name}", made))
        self.stolen += 14 * n / MEMORY + (0 if settings.offload_optimizer else 12 * n / settings.world / MEMORY)
        if settings.world > 1:
            after = (len(self.ops) - 1,)
            self.ops.append(Op(REDUCE, collective_seconds(settings, cluster, 4 * n), f"reduce {name}", after))
        own = 4 * n / settings.world
        after = (len(self.ops) - 1,)
        if settings.offload_optimizer:
            # The accumulated gradient is in host memory: fetched, added to and put back, and once more at the end.
            out = own * (2 if self.last_micro_step else 1)
            self.ops.append(Op(FROM_HOST, own / cluster.pcie_in_gb_s / 1e9, f"accumulated {name}", after))
            self.ops.append(Op(TO_HOST, out / cluster.pcie_out_gb_s / 1e9, f"accumulated {name}", (len(self.ops) - 1,)))
        else:
            self.ops.append(Op(CAST, 3 * own / MEMORY, f"accumulate {name}", after))
        for param, m, _ in self._bucket:
            if m > settings.reduce_bucket:
                self.ledger.give(f"d {param}")
        self._reductions.append(len(self.ops) - 1)
        self._bucket = []
        self.reduced += n
