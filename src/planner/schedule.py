"""The schedule of one micro-step: every shard's gather and work, forward and backward, and the memory on its way."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from src.planner.cluster import Cluster
from src.planner.ledger import Item, Ledger
from src.planner.rates import ATTENTION_BESIDE, EXPERTS_BESIDE, PRODUCTS_BESIDE
from src.planner.settings import Settings
from src.planner.streams import COMPUTE, FROM_HOST, SP, TO_HOST, Op
from src.planner.work import Bytes, Work
from src.planner.zero import Visit, Zero

INPUTS, KEPT, LAYER, LOSS = (
    "layer inputs",
    "attention outputs kept or fetched",
    "one layer's work",
    "head and loss",
)
# src/models/offload.py fetches the last four waiting tensors ahead: all that one layer leaves there.


@dataclass(frozen=True)
class Schedule:
    """forward_ops: how many of `ops` belong to the forward pass. gathered, reduced: elements through ZeRO."""

    ops: list[Op]
    forward_ops: int
    ledger: Ledger
    gathered: float
    reduced: float


@dataclass(frozen=True)
class _Layer:
    name: str
    dense: bool
    mtp: bool


def _layers(settings: Settings) -> list[_Layer]:
    s = settings.sizes
    layers = [_Layer(f"layer {i}", i < s.dense, False) for i in range(s.layers)]
    return [*layers, _Layer("MTP block", False, True)] if s.mtp else layers


class _Part(NamedTuple):
    """Of a visit's work; beside: as `Op`'s."""

    stream: str
    seconds: float
    what: str = ""
    beside: tuple[float, float] = PRODUCTS_BESIDE


class _MicroStep:
    def __init__(self, settings: Settings, cluster: Cluster, last: bool) -> None:
        self.settings, self.cluster = settings, cluster
        self.work = Work(settings, cluster)
        self.layers = _layers(settings)
        self.ops: list[Op] = []
        self.ledger = Ledger()
        self.visits = list(self._visits())
        self.zero = Zero(settings, cluster, self.visits, self.ops, self.ledger, last)
        self._next = 0
        self._host: dict[str, int] = {}  # the copy that brings a layer's tensors back

    # -- the order of calls, which DeepSpeed records and prefetches by ------------------------------------------------

    def _visits(self) -> Iterator[Visit]:
        s, work = self.settings, self.work
        recomputed = s.attention_output == "recompute"
        embedding, head = ("embedding", s.sizes.embedding), ("head", s.sizes.embedding)
        yield Visit("embedding", (embedding,), 0.0)
        for layer in self.layers:
            yield Visit(f"{layer.name} attention", self._attention(layer), 0.0)
            yield Visit(f"{layer.name} {'MLP' if layer.dense else 'router, shared'}", self._mlp(layer), 0.0)
            yield from self._shards(layer, work.experts(False))
        yield Visit("head and loss", (head,), work.head())
        yield Visit("head backward", (head,), 0.0, backward=True)
        for layer in reversed(self.layers) if s.activation_checkpointing else ():
            attention, mlp = self._attention(layer), self._mlp(layer)
            yield Visit(f"{layer.name} attention again", attention if recomputed else attention[:-1], 0.0)
            yield Visit(f"{layer.name} {'MLP' if layer.dense else 'router, shared'} again", mlp[:-1], 0.0)
            yield from reversed(list(self._shards(layer, work.experts(True), backward=True)))
            yield Visit(f"{layer.name} {'MLP' if layer.dense else 'router, shared'} backward", mlp, 0.0, backward=True)
            yield Visit(f"{layer.name} attention backward", attention, 0.0, backward=True)
        for layer in reversed(self.layers) if not s.activation_checkpointing else ():
            yield from reversed(list(self._shards(layer, work.experts(True), backward=True)))
            yield Visit(f"{layer.name} MLP backward", self._mlp(layer), 0.0, backward=True)
            yield Visit(f"{layer.name} attention backward", self._attention(layer), 0.0, backward=True)
        yield Visit("embedding backward", (embedding,), 0.0, backward=True)

    def _attention(self, layer: _Layer) -> tuple[tuple[str, int], ...]:
        s = self.settings.sizes
        own = [2 * s.hidden**2] if layer.mtp else []
        return tuple((f"{layer.name} attention {i}", n) for i, n in enumerate([*own, *s.attention]))

    def _mlp(self, layer: _Layer) -> tuple[tuple[str, int], ...]:
        return tuple((f"{layer.name} MLP {i}", n) for i, n in enumerate(self.settings.sizes.mlp(layer.dense)))

    def _shards(self, layer: _Layer, seconds: float, backward: bool = False) -> Iterator[Visit]:
        s = self.settings.sizes
        for shard in range(0 if layer.dense else s.shards):
            params = tuple(
                (f"{layer.name} shard {shard} {kind}", n) for kind, n in zip(("gate_up", "down"), s.shard, strict=True)
            )
            name = f"{layer.name} shard {shard}{' backward' if backward else ''}"
            yield Visit(name, params, seconds / s.shards, backward, EXPERTS_BESIDE)

    # -- operations ---------------------------------------------------------------------------------------------------

    def _op(self, op: Op) -> int:
        self.ops.append(op)
        return len(self.ops) - 1

    def _visit(
        self,
        *parts: _Part,
        after: tuple[int, ...] = (),
        during: Item | None = None,
        beside: Item | None = None,
    ) -> int:
        """The next visit: its gather, its work by `parts` or else its own, one after the other, its release.

        during: what the work needs until gradients come out; beside: until all of them are there.
        Casts and copies of other streams take the device's bandwidth: the computation lasts as much longer.
        """
        visit = self.visits[self._next]
        self._next += 1
        self.ledger.now = visit.name
        waits = (*self.zero.fetch(visit), *after)
        if during is not None:
            self.ledger.passing("during", during.group, during.nbytes, during.why)
        parts = parts or (_Part(COMPUTE, visit.seconds, beside=visit.beside),)
        last = -1
        for stream, seconds, what, slower in parts:
            if seconds == 0.0 and stream != COMPUTE:
                continue
            if stream == COMPUTE:
                seconds, self.zero.stolen = seconds + self.zero.stolen, 0.0
            last = self._op(Op(stream, seconds, f"{visit.name} {what}".rstrip(), waits, slower))
            waits = (last,)
        if visit.backward:
            self.zero.gradients(visit, last, beside)
        self.zero.release(visit)
        return last

    def _take(self, name: str, group: str, size: Bytes) -> None:
        self.ledger.take(name, group, size.nbytes, size.why)

    def _attention_parts(self, again: bool) -> list[_Part]:
        """Forward, or its recomputation."""
        work, kept = self.work, again and self.settings.attention_output != "recompute"
        return [
            _Part(COMPUTE, work.down() + 0.15 * work.elementwise(), "latents"),
            _Part(SP, work.latents(), "latents exchanged"),
            _Part(COMPUTE, work.up(), "heads"),
            _Part(COMPUTE, 0.0 if kept else work.attention(False), "scores and values", ATTENTION_BESIDE),
            _Part(SP, work.outputs(), "outputs exchanged"),
            _Part(COMPUTE, 0.0 if kept else work.out(), "output projection"),
        ]

    def _mlp_seconds(self, dense: bool) -> float:
        return self.work.mlp(dense) + 0.15 * self.work.elementwise()

    def forward(self) -> None:
        s, work = self.settings, self.work
        self._visit()
        for layer in self.layers:
            name = layer.name
            inputs = 2 if layer.mtp else 1
            self._take(f"{name} input", INPUTS, Bytes(inputs * work.layer_input().nbytes, work.layer_input().why))
            self.ledger.now = f"{name} forward"
            self._take("attention", LAYER, work.forward_attention())
            done = self._visit(*self._attention_parts(again=False))
            self.ledger.give("attention")
            if not s.activation_checkpointing:
                self._take(f"{name} graph", KEPT, work.graph_attention())
                self._take(f"{name} graph of MLP", KEPT, work.graph_mlp(layer.dense))
            if s.activation_checkpointing and s.attention_output == "offload":
                self._to_host(f"{name} attention output", work.kept_output(), done)
            elif s.activation_checkpointing and s.attention_output == "keep" or not s.activation_checkpointing:
                self._take(f"{name} kept", KEPT, work.kept_output())
            if not layer.dense and s.activation_checkpointing:
                self._take(f"{name} route", KEPT, work.route())
            self._take("MLP", LAYER, work.forward_dense() if layer.dense else work.forward_experts())
            done = self._visit(_Part(COMPUTE, self._mlp_seconds(layer.dense)))
            if not layer.dense:
                self.zero.host_works(0.0, done)  # which must know the route before it can call the shards
            for _ in range(0 if layer.dense else s.sizes.shards):
                done = self._visit()
            self.ledger.give("MLP")
            if s.activation_checkpointing and s.layer_input == "offload":
                size = Bytes(inputs * work.layer_input().nbytes, "")
                self._to_host(f"{name} input", size, done)
                self.ledger.give(f"{name} input")
        for what, size in work.head_work():
            self._take(what, LOSS, size)
        self._visit()
        self.ledger.give("logits of a chunk")
        self.ledger.give("gradients of logits")

    def _to_host(self, what: str, size: Bytes, after: int) -> None:
        self._op(Op(TO_HOST, size.nbytes / (self.cluster.pcie_out_gb_s * 1e9), what, (after,)))

    def _fetch_ahead(self, layer: _Layer | None, after: tuple[int, ...]) -> None:
        """Starts bringing a layer's waiting tensors back from the host."""
        if layer is None or not self.settings.activation_checkpointing:
            return
        work, rate = self.work, self.cluster.pcie_in_gb_s * 1e9
        nbytes = 0.0
        if self.settings.attention_output == "offload":
            self._take(f"{layer.name} kept", KEPT, work.kept_output())
            nbytes += work.kept_output().nbytes
        if self.settings.layer_input == "offload":
            size = Bytes((2 if layer.mtp else 1) * work.layer_input().nbytes, work.layer_input().why)
            self._take(f"{layer.name} input", INPUTS, size)
            nbytes += size.nbytes
        if nbytes:
            self._host[layer.name] = self._op(Op(FROM_HOST, nbytes / rate, f"{layer.name} from the host", after))

    def backward(self) -> None:
        work = self.work
        self._visit()  # the head: its gradients are there
        self.ledger.give("fp32 gradient of the head")
        self.ledger.give("hidden states of the targets")
        self._take("gradient between layers", LAYER, work.layer_input())
        order = list(reversed(self.layers))
        self._fetch_ahead(order[0], ())
        for layer, before in zip(order, [*order[1:], None], strict=True):
            self._layer_backward(layer, before)
        self.ledger.give("gradient between layers")
        self._visit()
        self.zero.flush()

    def _layer_backward(self, layer: _Layer, before: _Layer | None) -> None:
        s, work, name = self.settings, self.work, layer.name
        fetched = (self._host[name],) if name in self._host else ()
        if s.activation_checkpointing:
            self.ledger.now = f"{name} recomputation"
            self._take("graph", LAYER, work.graph_attention())
            if s.attention_output == "recompute":
                self._take(f"{name} kept", KEPT, work.kept_output())
            arrived = self._visit(*self._attention_parts(again=True), after=fetched)
            self._fetch_ahead(before, (arrived,))
            self._take("graph of MLP", LAYER, work.graph_mlp(layer.dense))
            self._visit(_Part(COMPUTE, 0.6 * work.mlp(layer.dense) + 0.15 * work.elementwise()))
        self._take("MLP", LAYER, work.backward_dense() if layer.dense else work.layer_input())
        for shard in range(0 if layer.dense else s.sizes.shards):
            self._visit(during=Item(LAYER, *work.shard_activations()), beside=Item(LAYER, *work.shard_backward()))
            self._take(f"rows {shard}", LAYER, work.shard_gradient())
        self._visit(_Part(COMPUTE, 2 * work.mlp(layer.dense) + 0.25 * work.elementwise()))
        for shard in range(0 if layer.dense else s.sizes.shards):
            self.ledger.give(f"rows {shard}")
        self.ledger.give("MLP")
        self.ledger.give("graph of MLP" if s.activation_checkpointing else f"{name} graph of MLP")
        self._visit(
            _Part(COMPUTE, 2 * work.out(), "output projection"),
            _Part(SP, work.outputs(), "gradients of outputs exchanged"),
            _Part(COMPUTE, work.attention(True), "scores and values", ATTENTION_BESIDE),
            _Part(COMPUTE, 2 * work.up() + 0.3 * work.elementwise(), "heads"),
            _Part(SP, work.latents(), "gradients of latents exchanged"),
            _Part(COMPUTE, 2 * work.down(), "latents"),
            during=Item(LAYER, *work.backward_attention()),
        )
        self.ledger.give("graph" if s.activation_checkpointing else f"{name} graph")
        if f"{name} route" in self.ledger.live:
            self.ledger.give(f"{name} route")
        self.ledger.give(f"{name} kept")
        self.ledger.give(f"{name} input")


def micro_step(settings: Settings, cluster: Cluster, last: bool = True) -> Schedule:
    """One micro-step of one rank; `last` of its optimizer step, when an offloaded gradient crosses PCIe once more."""
    build = _MicroStep(settings, cluster, last)
    build.forward()
    forward_ops = len(build.ops)
    build.backward()
    return Schedule(build.ops, forward_ops, build.ledger, build.zero.gathered, build.zero.reduced)
