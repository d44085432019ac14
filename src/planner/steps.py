"""The micro-step, written once: every call of a module in its order, with its weights, its work and its memory.

`micro_step` lays it out on the streams of the GPU, `zero` gathers and reduces for it, and the ledger counts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from src.models.deepseek_v3.sizes import attention_weights, mlp_weights
from src.planner.cluster import Cluster
from src.planner.ledger import INPUTS, KEPT, LAYER, Line
from src.planner.network import Exchange
from src.planner.rates import (
    ATTENTION_BESIDE,
    ELEMENTWISE_BACKWARD_ATTENTION,
    ELEMENTWISE_BACKWARD_MLP,
    ELEMENTWISE_FORWARD,
    EXPERTS_BESIDE,
    HOST_ROUTE,
    HOST_SHARD,
    PRODUCTS_BESIDE,
)
from src.planner.settings import Settings
from src.planner.streams import COMPUTE, EP, SP, Op
from src.planner.tensors import Tensors
from src.planner.work import Work


class Weight(NamedTuple):
    """A parameter of `size` elements, partitioned over `ranks`. expert: of a shard of experts."""

    name: str
    size: int
    ranks: int
    expert: bool = False


Weights = tuple[Weight, ...]


@dataclass(frozen=True)
class Visit:
    """One call of a module, or of its backward. Memory is by name, with the line of the account that it belongs to.

    weights: that it uses, in the order of their use. parts: its work, one after the other. backward: the weights'
    gradients come out. syncs: the host waits for its end. host: seconds that the host needs besides the weights'.
    takes: allocated before its weights are fetched. during: there until gradients come out; beside: until all are.
    gives: freed behind it; leaves: allocated behind it; stows: copied to the host behind it, in bytes.
    fetches: fetched from the host behind it; awaits: fetched or brought before it, and used here. brings: what its
    exchange of tokens brings for a later visit, while its next part does not wait.
    """

    name: str
    weights: Weights
    parts: tuple[Op, ...] = (Op(COMPUTE, 0.0, beside=PRODUCTS_BESIDE),)
    backward: bool = False
    syncs: bool = False
    host: float = 0.0
    takes: Mapping[str, Line] = field(default_factory=dict)
    during: Line | None = None
    beside: Line | None = None
    gives: tuple[str, ...] = ()
    leaves: Mapping[str, Line] = field(default_factory=dict)
    stows: Mapping[str, float] = field(default_factory=dict)
    fetches: Mapping[str, Line] = field(default_factory=dict)
    awaits: tuple[str, ...] = ()
    brings: str = ""


def visits(settings: Settings, cluster: Cluster) -> Iterator[Visit]:
    """Forward and backward of one micro-step."""
    s, work, tensors = settings.sizes, Work(settings, cluster), Tensors(settings)
    layers = [_Layer(settings, work, tensors, index) for index in range(s.layers)]
    embedding, head = ((Weight(name, s.embedding, settings.world),) for name in ("embedding", "head"))
    yield Visit("embedding", embedding)
    for layer in layers:
        yield from layer.forward()
    loss, logits = tensors.head(), ("logits of a chunk", "gradients of logits")
    yield Visit("head and loss", head, (_compute(work.head()),), takes=loss, gives=logits)
    between = "gradient between layers"
    yield Visit(
        "head backward",
        head,
        backward=True,
        gives=tuple(what for what in loss if what not in logits),
        leaves={between: tensors.layer_input()},
        fetches=layers[-1].waiting(),
    )
    for layer in reversed(layers):
        yield from layer.backward(layers[layer.index - 1].waiting() if layer.index else {})
    yield Visit("embedding backward", embedding, backward=True, gives=(between,))


def _compute(seconds: float, what: str = "", beside: tuple[float, float] = PRODUCTS_BESIDE) -> Op:
    return Op(COMPUTE, seconds, what, beside=beside)


def _exchange(stream: str, exchange: Exchange, what: str) -> Op:
    return Op(stream, exchange.seconds, what, nbytes=exchange.nbytes)


class _Layer:
    def __init__(self, settings: Settings, work: Work, tensors: Tensors, index: int) -> None:
        s = settings.sizes
        self.mtp = mtp = index == s.num_hidden_layers
        self.settings, self.work, self.tensors, self.index = settings, work, tensors, index
        self.dense, self.again = s.dense(index), settings.activation_checkpointing
        self.name = "MTP block" if mtp else f"layer {index}"
        self.mlp_name = f"{self.name} {'MLP' if self.dense else 'router, shared'}"
        one = tensors.layer_input()
        self.input = replace(one, nbytes=2 * one.nbytes) if mtp else one  # its block has two
        projections = ({"eh_proj": 2 * s.hidden_size**2} if mtp else {}) | attention_weights(s)
        self.attention = self._weights(projections, settings.world)
        self.mlp = self._weights(mlp_weights(s, self.dense), settings.world)
        self._host = 0.0 if self.dense else HOST_ROUTE
        self.shards = [
            self._weights({f"shard {shard} {name}": size for name, size in s.shard.items()}, settings.holders, True)
            for shard in range(0 if self.dense else s.shards // settings.ep)
        ]
        self.travels = settings.ep > 1 and not self.dense
        self.brought = f"{self.name} tokens" if self.travels else ""

    def _weights(self, sizes: Mapping[str, int], ranks: int, expert: bool = False) -> Weights:
        return tuple(Weight(f"{self.name} {name}", size, ranks, expert) for name, size in sizes.items())

    def _own(self, group: str, **lines: Line) -> dict[str, Line]:
        """Memory of this layer by name, counted under a line of the account."""
        return {f"{self.name} {name}": replace(line, name=group) for name, line in lines.items()}

    # -- work ---------------------------------------------------------------------------------------------------------

    def _attention_parts(self, kept: bool) -> tuple[Op, ...]:
        """Forward, or its recomputation, of which the kernel and the output projection may be kept."""
        work = self.work
        return (
            _compute(work.down() + ELEMENTWISE_FORWARD * work.elementwise(), "latents"),
            _exchange(SP, work.latents(), "latents exchanged"),
            _compute(work.up(), "heads"),
            _compute(0.0 if kept else work.attention(False), "scores and values", ATTENTION_BESIDE),
            _exchange(SP, work.outputs(), "outputs exchanged"),
            _compute(0.0 if kept else work.out(), "output projection"),
        )

    def _attention_backward(self) -> tuple[Op, ...]:
        work = self.work
        return (
            _compute(2 * work.out(), "output projection"),
            _exchange(SP, work.outputs(), "gradients of outputs exchanged"),
            _compute(work.attention(True), "scores and values", ATTENTION_BESIDE),
            _compute(2 * work.up() + ELEMENTWISE_BACKWARD_ATTENTION * work.elementwise(), "heads"),
            _exchange(SP, work.latents(), "gradients of latents exchanged"),
            _compute(2 * work.down(), "latents"),
        )

    def _mlp_parts(self, weights: Weights, times: int, elementwise: float) -> tuple[Op, ...]:
        products = self.work.products(times * sum(weight.size for weight in weights))
        return (_compute(products + elementwise * self.work.elementwise()),)

    def _shared_parts(self) -> tuple[Op, ...]:
        """Router and shared expert, forward; behind its first projection tokens leave, while the others run."""
        if not self.travels:
            return self._mlp_parts(self.mlp, 1, ELEMENTWISE_FORWARD)
        rest = self.work.products(sum(weight.size for weight in self.mlp[-2:]))
        come = _exchange(EP, self.work.travel(1), "tokens come")
        return (*self._mlp_parts(self.mlp[:-2], 1, ELEMENTWISE_FORWARD), come, _compute(rest, "other projections"))

    def _shard_parts(self, shard: int, backward: bool) -> tuple[Op, ...]:
        """Behind the last that runs the sums return, and what comes next waits for them."""
        experts = _compute(self.work.experts(backward) / len(self.shards), beside=EXPERTS_BESIDE)
        if not self.travels or shard != (0 if backward else len(self.shards) - 1):
            return (experts,)
        return (experts, _exchange(EP, self.work.travel(1), "sums return"), _compute(0.0, "sums"))

    # -- visits -------------------------------------------------------------------------------------------------------

    def forward(self) -> Iterator[Visit]:
        s, tensors = self.settings, self.tensors
        offloads = self.again and s.attention_output == "offload"
        output = tensors.kept_output()
        kept = self._own(KEPT, kept=output) if not self.again or s.attention_output == "keep" else {}
        if not self.again:
            kept |= self._own(KEPT, graph=tensors.graph_attention(), mlp_graph=tensors.graph_mlp(self.dense))
        yield Visit(
            f"{self.name} attention",
            self.attention,
            self._attention_parts(kept=False),
            takes=self._own(INPUTS, input=self.input) | {"attention": tensors.forward_attention()},
            gives=("attention",),
            leaves=kept,
            stows={f"{self.name} attention output": output.nbytes} if offloads else {},
        )
        route = self._own(KEPT, route=tensors.route()) if self.again and not self.dense else {}
        calls = [
            Visit(
                self.mlp_name,
                self.mlp,
                self._shared_parts(),
                takes=route | {"MLP": tensors.forward_dense() if self.dense else tensors.forward_experts()},
                syncs=not self.dense,  # for the route, without which it cannot call the shards
                host=self._host,
                brings=self.brought,
            )
        ]
        for shard, weights in enumerate(self.shards):
            calls.append(Visit(f"{self.name} shard {shard}", weights, self._shard_parts(shard, False), host=HOST_SHARD))
        if self.travels:
            calls[1] = replace(calls[1], awaits=(self.brought,))
        leaving = {f"{self.name} input": self.input.nbytes} if self.again and s.layer_input == "offload" else {}
        calls[-1] = replace(calls[-1], gives=("MLP", *leaving), stows=leaving)
        yield from calls

    def waiting(self) -> dict[str, Line]:
        """What this layer left in host memory: src/models/offload.py fetches all that one layer leaves ahead."""
        s = self.settings
        kept = self._own(KEPT, kept=self.tensors.kept_output()) if s.attention_output == "offload" else {}
        inputs = self._own(INPUTS, input=self.input) if s.layer_input == "offload" else {}
        return kept | inputs if self.again else {}

    def backward(self, ahead: Mapping[str, Line]) -> Iterator[Visit]:
        """ahead: what is fetched from the host for the layer whose backward comes next."""
        tensors = self.tensors
        if self.again:
            yield from self._recomputation(ahead)
        calls = [
            Visit(
                f"{self.name} shard {shard} backward",
                weights,
                self._shard_parts(shard, True),
                backward=True,
                host=HOST_SHARD,
                during=tensors.shard_activations(),
                beside=tensors.shard_backward(),
                leaves={f"rows {shard}": tensors.shard_gradient()},
            )
            for shard, weights in reversed(list(enumerate(self.shards)))
        ]
        parts = self._mlp_parts(self.mlp, 2, ELEMENTWISE_BACKWARD_MLP)
        graph, *rows = f"{self.name} mlp_graph", "MLP", *(f"rows {shard}" for shard in range(len(self.shards)))
        mlp = Visit(f"{self.mlp_name} backward", self.mlp, parts, backward=True, host=self._host, gives=(*rows, graph))
        if not self.travels:
            calls.append(mlp)
        else:  # first, while tokens and gradients travel; what the last shard leaves is summed at once
            leave = _compute(0.0, "tokens leave"), _exchange(EP, self.work.travel(2), "tokens and gradients come")
            mlp = replace(mlp, parts=(*leave, *parts), gives=(graph,), brings=self.brought)
            calls[0] = replace(calls[0], awaits=(self.brought,))
            calls[-1] = replace(calls[-1], leaves={}, gives=tuple(name for name in rows if name != "rows 0"))
            calls.insert(0, mlp)
        calls[0] = replace(
            calls[0], takes={"MLP": tensors.backward_dense() if self.dense else tensors.backward_experts()}
        )
        yield from calls
        held = ["graph", "kept", "input"]
        if self.again:
            held += ["route"] * (not self.dense) + ["joined"] * self.mtp
        yield Visit(
            f"{self.name} attention backward",
            self.attention,
            self._attention_backward(),
            backward=True,
            during=tensors.backward_attention(),
            gives=tuple(f"{self.name} {what}" for what in held),
        )

    def _recomputation(self, ahead: Mapping[str, Line]) -> Iterator[Visit]:
        """Without the last projection of each half where nothing needs its result."""
        tensors, recomputed = self.tensors, self.settings.attention_output == "recompute"
        kept = self._own(KEPT, kept=tensors.kept_output(projection=False)) if recomputed else {}
        if self.mtp:
            kept |= self._own(LAYER, joined=tensors.joined())
        yield Visit(
            f"{self.name} attention again",
            self.attention if recomputed else self.attention[:-1],
            self._attention_parts(kept=not recomputed),
            takes=self._own(LAYER, graph=tensors.graph_attention()) | kept,
            fetches=ahead,
            awaits=tuple(self.waiting()),
        )
        yield Visit(
            f"{self.mlp_name} again",
            self.mlp[:-1],
            self._mlp_parts(self.mlp[:-1], 1, ELEMENTWISE_FORWARD),
            host=self._host,
            takes=self._own(LAYER, mlp_graph=tensors.graph_mlp(self.dense)),
        )
