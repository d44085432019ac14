"""ZeRO-3's gathers and reductions in DeepSpeed 0.19.8's order: what it prefetches, what it copies and what waits.

Follows `PartitionedParameterCoordinator.fetch_sub_module` and `release_sub_module`,
`DeepSpeedZeroOptimizer_Stage3.__reduce_and_partition_ipg_grads` and `src/strategies/zero3_collectives.py`. The host
runs ahead of the device, by two gathers and two reductions at most, and nothing starts before the host launches it.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from src.planner import rates
from src.planner.cluster import Cluster
from src.planner.ledger import GRADIENTS, SHARDS, Line
from src.planner.network import Exchange, collective, halves
from src.planner.settings import Settings
from src.planner.steps import Visit, Weight, Weights
from src.planner.streams import CAST, FROM_HOST, TO_HOST, ZERO, Op, Schedule
from src.strategies.zero_limits import OWN_MEMORY, PIECE, reduced_in_pieces, zero3_limits

EVENTS = 2  # gathers, and reductions, that may be unfinished when the host launches the next
NORM_ELEMENTS = 250_000_000  # whose norm is taken at once (`_constant_buffered_norm2`)


@dataclass
class _Gather:
    """Weights that one collective gathers. flat: the buffer of the small ones, which their copies out of it free."""

    op: int
    small: Weights
    flat: str | None


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
        self.schedule, self.ledger, self._add = schedule, schedule.ledger, schedule.add
        shards = [sum(w.size for w in visit.weights) for visit in order if visit.weights[0].expert]
        limits = zero3_limits(max(shards or (w.size for visit in order for w in visit.weights)))
        self._prefetch_size = limits["stage3_prefetch_bucket_size"]
        self._max_live = limits["stage3_max_live_parameters"]
        self._alone = settings.world == 1
        self._whole = (self._alone and not settings.offload_parameters) or settings.stage < 3  # nothing is gathered
        self._queue = deque((weight, step) for step, visit in enumerate(order) for weight in visit.weights)
        self._step = 0
        self._available: set[Weight] = set()  # gathered or under way
        self._under_way: dict[Weight, _Gather] = {}
        self._fetched_for: dict[Weight, int] = {}  # the last step
        self._bucket: list[Weight] = []  # their gradients
        self._made_by: set[int] = set()  # the operations that made those
        self._buffers = 0
        self._released: tuple[int, ...] = ()
        self._arrivals: list[int] = []  # gathers that the host has waited for
        self._reductions: list[int] = []

    # -- weights ------------------------------------------------------------------------------------------------------

    def fetch(self, visit: Visit) -> tuple[int, ...]:
        """Gathers what the visit needs and is not there, then prefetches; returns what its computation waits for."""
        assert self.order[self._step] is visit
        a_parameter = rates.HOST_PARAMETER_ALONE if self._whole else rates.HOST_PARAMETER
        self.schedule.host_works(a_parameter * len(visit.weights) + visit.host)
        waits: tuple[int, ...] = ()
        if not self._whole:
            self._gather([w for w in visit.weights if w not in self._available], visit.name)
            waits = tuple(self._arrive(w) for w in visit.weights if w in self._under_way)
            fresh = {w for w in visit.weights if self._fetched_for.get(w, -1) < self._step}
            while self._queue and fresh:
                weight, self._fetched_for[weight] = self._queue.popleft()
                assert weight in fresh, f"{weight.name} is not what {visit.name} needs next"
                fresh.discard(weight)
            self._prefetch()
        self._step += 1
        return (*waits, self.schedule.host)

    def _prefetch(self) -> None:
        limit = min(self._max_live - _elements(self._available), self._prefetch_size)
        ahead: list[Weight] = []
        while self._queue and _elements(ahead) < limit:
            weight, step = self._queue.popleft()
            self._fetched_for[weight] = max(self._fetched_for.get(weight, -1), step)
            if weight not in self._available and weight not in ahead:
                ahead.append(weight)
        if ahead:
            self._gather(ahead, f"prefetched: {ahead[0].name}")

    def _gather(self, weights: Sequence[Weight], what: str) -> None:
        if not weights:
            return
        s = self.settings
        small = tuple(w for w in weights if w.size * s.param_bytes < OWN_MEMORY and not self._in_place(w))
        flat = None
        if not self._alone and len(small) > 1:
            self._buffers += 1
            flat = f"flat {self._buffers}"
            nbytes = s.param_bytes * _elements(small)
            why = f"{nbytes / 1e9:.2f} GB under way, gathered together: {small[0].name} ..."
            self.ledger.take(flat, Line(SHARDS, nbytes, why))
        else:
            small = ()
        for weight in weights:
            if weight not in small:
                self._take(weight)
        # The stream that gathers waits for the computation that used the last memory to be released.
        done = (self.schedule.host, *self._released)
        if s.offload_parameters:
            partitions = s.param_bytes * sum(w.size / w.ranks for w in weights)
            copy = Op(FROM_HOST, partitions / (self.cluster.pcie_in_gb_s * 1e9), f"partitions of {what}", done)
            done = (self._add(copy),)
        by_ranks = Counter[int]()
        for weight in weights:
            by_ranks[weight.ranks] += weight.size
        self.schedule.gathered += by_ranks
        if not self._alone:
            of = [collective(s, self.cluster, ranks, s.param_bytes * n) for ranks, n in by_ranks.items()]
            seconds, received = sum(e.seconds for e in of), sum(e.nbytes for e in of)
            done = (self._add(Op(ZERO, seconds, f"gather {what}", done, nbytes=received)),)
        self._available |= set(weights)
        self._under_way |= dict.fromkeys(weights, _Gather(done[0], small, flat))

    def _in_place(self, weight: Weight) -> bool:
        """Whether it is used where it lies: an expert that no other rank has."""
        return weight.ranks == 1 and not self._alone and not self.settings.offload_parameters

    def _take(self, weight: Weight) -> None:
        nbytes = 0 if self._in_place(weight) else weight.size * self.settings.param_bytes
        self.ledger.take(weight.name, Line(SHARDS, nbytes, f"{weight.size / 1e6:.0f}e6 elements of {weight.name}"))

    def _arrive(self, weight: Weight) -> int:
        """Waits for a weight's gather; for its first weight, copies the small ones out of the flat buffer."""
        self._back_pressure(self._arrivals)
        gather = self._under_way.pop(weight)
        self._arrivals.append(gather.op)
        if gather.flat is not None:
            for other in gather.small:
                self._take(other)
                self.schedule.stolen += 2 * other.size * self.settings.param_bytes / self.cluster.copy
            self.ledger.give(gather.flat)
            gather.flat = None
        return gather.op

    def _back_pressure(self, events: list[int]) -> None:
        if len(events) > EVENTS:
            self.schedule.host_works(0.0, events[-1 - EVENTS])

    def release(self, visit: Visit, done: int) -> None:
        """Frees a visit's weights once `done` has used them, except those that are prefetched for a later visit."""
        for weight in visit.weights:
            there = weight in self._available and weight not in self._under_way
            if there and self._fetched_for[weight] < self._step:
                self._available.remove(weight)
                self._released = (done,)
                self.ledger.give(weight.name)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def gradients(self, visit: Visit, made_by: int) -> None:
        """Puts the visit's weight gradients into the bucket, which is reduced first where they would overfill it.

        What is `beside` of the computation is still there when the gradients are, and gone when they are reduced.
        """
        made = [w._replace(size=int(w.size * self.settings.trained)) for w in visit.weights]
        for weight in made:
            why = f"{weight.size / 1e6:.0f}e6 elements, gradient of {weight.name}"
            self.ledger.take(f"d {weight.name}", Line(GRADIENTS, weight.size * self.settings.param_bytes, why))
        if visit.beside is not None:
            self.ledger.passing(visit.beside)
        for weight in made:
            filled = _elements(self._bucket) + weight.size > self.settings.reduce_bucket
            if self._bucket and (filled or self._bucket[0].ranks != weight.ranks):
                self.flush()
            self._bucket.append(weight)
            self._made_by.add(made_by)

    def flush(self) -> None:
        """Casts a bucket to fp32, reduces and scatters it, and adds this rank's part to the accumulated gradient."""
        if not self._bucket:
            return
        s, cluster, (first, *_) = self.settings, self.cluster, self._bucket
        self._back_pressure(self._reductions)
        n, half = _elements(self._bucket), _elements(w for w in self._bucket if w.expert) if s.halves else 0
        pieces = len(self._bucket) == 1 and (n > PIECE if half else reduced_in_pieces(n, first.ranks))
        self.ledger.passing(self._copies(n, half, pieces))
        # Cast, reduction and sum of one bucket end before the next one's begin: they share a stream.
        after = (*self._made_by, *self._reductions[-1:], self.schedule.host)
        own = 4 * n / first.ranks
        # Cast, division and layout by rank in one pass, or layout and sum in bf16: as many bytes. Of a gradient in
        # pieces all but the first beside the reduction.
        cast, add_up = (s.param_bytes + 4) / cluster.copy, 3 * own / cluster.copy
        begun = min(n, PIECE) if pieces else n
        last = self._add(Op(CAST, cast * begun, f"cast gradient of {first.name}", after))
        self.schedule.stolen += cast * n + (0 if s.offload_optimizer else add_up)
        if first.ranks > 1:
            of = halves(s, cluster, half) if half else Exchange()
            whole = collective(s, cluster, first.ranks, 4 * (n - half), summed=True) if n > half else Exchange()
            seconds, nbytes = of.seconds + whole.seconds, of.nbytes + whole.nbytes
            last = self._add(Op(ZERO, seconds, f"reduce gradient of {first.name}", (last,), nbytes=nbytes))
        accumulated = f"accumulated gradient of {first.name}"
        if s.offload_optimizer:
            # The accumulated gradient is in host memory: fetched, added to and put back, and once more at the end.
            out = own * (2 if self.last_micro_step else 1)
            last = self._add(Op(FROM_HOST, own / cluster.pcie_in_gb_s / 1e9, accumulated, (last,)))
            last = self._add(Op(TO_HOST, out / cluster.pcie_out_gb_s / 1e9, accumulated, (last,)))
        else:
            last = self._add(Op(CAST, add_up, accumulated, (last,)))
        for weight in self._bucket:
            self.ledger.give(f"d {weight.name}")
        self._reductions.append(last)
        self._bucket, self._made_by = [], set()
        self.schedule.halved += half
        self.schedule.reduced[first.ranks] += n

    def _copies(self, n: int, half: int, pieces: bool) -> Line:
        """What a bucket's reduction allocates: its elements in fp32, or two pieces of them and this rank's part.

        half: elements of the n that travel in bf16.
        """
        s, first = self.settings, self._bucket[0]
        overwritten = len(self._bucket) == 1 and s.param_bytes == 4
        nbytes = 0.0 if overwritten else 4.0 * n
        why = f"fp32 copy of the gradient of {first.name}, {n / 1e6:.0f}e6 elements x 4 bytes"
        if pieces:
            nbytes = 4.0 * (2 * PIECE + n / first.ranks)
            why = f"fp32 copies of the gradient of {first.name}: two pieces of {PIECE / 1e6:.0f}e6 elements x 4 bytes"
        if half:
            piece = min(half, PIECE) if pieces else half
            # A node's sum in fp32 and bf16, two pieces on their way between nodes.
            sums = 12 * piece / s.holders_per_node if s.two_exchanges else 0
            nbytes = 4 * min(half, 2 * piece) + sums + 4 * (n - half + half / s.holders)
            why = f"gradient of {first.name}: {min(half, 2 * piece) / 1e6:.0f}e6 elements x 2 bytes, sent and received"
        if s.offload_optimizer:  # the accumulated gradient comes to the device, and its norm is taken in fp64
            largest = max(w.size for w in self._bucket) / first.ranks
            nbytes += 4 * largest + 8 * min(largest, NORM_ELEMENTS)
            why += f", and {largest / 1e6:.0f}e6 accumulated x 4 bytes with their norm's fp64 copy"
        return Line(GRADIENTS, nbytes, why)


def _elements(weights: Iterable[Weight]) -> int:
    return sum(weight.size for weight in weights)
