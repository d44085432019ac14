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
    loss, logits = tensors.head, ("logits of a chunk", "gradients of logits")
    yield Visit("head and loss", head, (_compute(work.head),), takes=loss, gives=logits)
    between = "gradient between layers"
    yield Visit(
        "head backward",
        head,
        backward=True,
        gives=tuple(what for what in loss if what not in logits),
        leaves={between: tensors.layer_input},
        fetches=layers[-1].waiting,
    )
    for layer in reversed(layers):
        yield from layer.backward(layers[layer.index - 1].waiting if layer.index else {})
    yield Visit("embedding backward", embedding, backward=True, gives=(between,))


def _compute(seconds: float, what: str = "", beside: tuple[float, float] = PRODUCTS_BESIDE) -> Op:
    return Op(COMPUTE, seconds, what, beside=beside)


def _exchange(stream: str, exchange: Exchange, what: str) -> Op:
    return Op(stream, exchange.seconds, what, nbytes=exchange.nbytes)


class _Layer:
    """again: its backward begins by computing the forward again."""

    def __init__(self, settings: Settings, work: Work, tensors: Tensors, index: int) -> None:
        s = settings.sizes
        self.mtp = index == s.num_hidden_layers
        self.settings, self.work, self.tensors, self.index = settings, work, tensors, index
        self.dense, self.again = s.dense(index), settings.activation_checkpointing
        self.name = "MTP block" if self.mtp else f"layer {index}"
        self.mlp_name = f"{self.name} {'MLP' if self.dense else 'router, shared'}"
        self.mlp_forward, self.mlp_graph, self.mlp_backward = tensors.dense if self.dense else tensors.experts
        inputs = 2 if self.mtp else 1
        self.input = self._own(INPUTS, input=replace(tensors.layer_input, nbytes=inputs * tensors.layer_input.nbytes))
        self.stows_output = self.again and settings.attention_output == "offload"
        self.stows_input = self.again and settings.layer_input == "offload"
        # src/models/offload.py fetches from the host all that one layer leaves there, ahead.
        self.waiting = self._own(KEPT, kept=tensors.kept_output) if self.stows_output else {}
        self.waiting |= self.input if self.stows_input else {}
        projections = ({"eh_proj": 2 * s.hidden_size**2} if self.mtp else {}) | attention_weights(s)
        self.attention = self._weights(projections, settings.world)
        self.mlp = self._weights(mlp_weights(s, self.dense), settings.world)
        self.mlp_host = 0.0 if self.dense else HOST_ROUTE
        self.travels = settings.ep > 1 and not self.dense
        self.brought = f"{self.name} tokens" if self.travels else ""
        self.shards = [
            self._weights({f"shard {shard} {name}": size for name, size in s.shard.items()}, settings.holders, True)
            for shard in range(0 if self.dense else s.shards // settings.ep)
        ]

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
            _compute(work.down + ELEMENTWISE_FORWARD * work.elementwise, "latents"),
            _exchange(SP, work.latents, "latents exchanged"),
            _compute(work.up, "heads"),
            _compute(0.0 if kept else work.attention(False), "scores and values", ATTENTION_BESIDE),
            _exchange(SP, work.outputs, "outputs exchanged"),
            _compute(0.0 if kept else work.out, "output projection"),
        )

    def _attention_backward(self) -> tuple[Op, ...]:
        work = self.work
        return (
            _compute(2 * work.out, "output projection"),
            _exchange(SP, work.outputs, "gradients of outputs exchanged"),
            _compute(work.attention(True), "scores and values", ATTENTION_BESIDE),
            _compute(2 * work.up + ELEMENTWISE_BACKWARD_ATTENTION * work.elementwise, "heads"),
            _exchange(SP, work.latents, "gradients of latents exchanged"),
            _compute(2 * work.down, "latents"),
        )

    def _mlp_parts(self, weights: Weights, times: int, elementwise: float) -> tuple[Op, ...]:
        products = self.work.products(times * sum(weight.size for weight in weights))
        return (_compute(products + elementwise * self.work.elementwise),)

    def _shared_parts(self) -> tuple[Op, ...]:
        """Router and shared expert, forward; behind its first projection tokens leave, while the others run."""
        if not self.travels:
            return self._mlp_parts(self.mlp, 1, ELEMENTWISE_FORWARD)
        rest = self.work.products(sum(weight.size for weight in self.mlp[-2:]))
        come = _exchange(EP, self.work.travel(1), "tokens come")
        return (*self._mlp_parts(self.mlp[:-2], 1, ELEMENTWISE_FORWARD), come, _compute(rest, "other projections"))

    def _shard_visits(self, backward: bool) -> list[Visit]:
        """The first to run waits for tokens; behind the last the sums return, and what comes next waits for them."""
        work, tensors, runs = self.work, self.tensors, list(enumerate(self.shards))
        if not runs:
            return []
        experts = _compute(work.experts(backward) / len(runs), beside=EXPERTS_BESIDE)
        calls = [
            Visit(
                f"{self.name} shard {shard}{' backward' if backward else ''}",
                weights,
                (experts,),
                backward=backward,
                host=HOST_SHARD,
                during=tensors.shard_activations if backward else None,
                beside=tensors.shard_backward if backward else None,
                leaves={f"rows {shard}": tensors.shard_gradient} if backward else {},
            )
            for shard, weights in (reversed(runs) if backward else runs)
        ]
        if self.travels:
            calls[0] = replace(calls[0], awaits=(self.brought,))
            sums = _exchange(EP, work.travel(1), "sums return"), _compute(0.0, "sums")
            calls[-1] = replace(calls[-1], parts=(experts, *sums))
        return calls

    # -- visits -------------------------------------------------------------------------------------------------------

    def forward(self) -> Iterator[Visit]:
        tensors, output = self.tensors, self.tensors.kept_output
        stays = not self.again or self.settings.attention_output == "keep"
        kept = self._own(KEPT, kept=output) if stays else {}
        if not self.again:
            kept |= self._own(KEPT, graph=tensors.graph_attention, mlp_graph=self.mlp_graph)
        yield Visit(
            f"{self.name} attention",
            self.attention,
            self._attention_parts(kept=False),
            takes=self.input | {"attention": tensors.forward_attention},
            gives=("attention",),
            leaves=kept,
            stows={f"{self.name} attention output": output.nbytes} if self.stows_output else {},
        )
        route = self._own(KEPT, route=tensors.route) if self.again and not self.dense else {}
        mlp = Visit(
            self.mlp_name,
            self.mlp,
            self._shared_parts(),
            takes=route | {"MLP": self.mlp_forward},
            syncs=not self.dense,  # for the route, without which it cannot call the shards
            host=self.mlp_host,
            brings=self.brought,
        )
        *calls, last = [mlp, *self._shard_visits(backward=False)]
        leaving = {name: line.nbytes for name, line in self.input.items()} if self.stows_input else {}
        yield from (*calls, replace(last, gives=("MLP", *leaving), stows=leaving))

    def backward(self, ahead: Mapping[str, Line]) -> Iterator[Visit]:
        """ahead: what is fetched from the host for the layer whose backward comes next."""
        tensors = self.tensors
        if self.again:
            yield from self._recomputation(ahead)
        parts = self._mlp_parts(self.mlp, 2, ELEMENTWISE_BACKWARD_MLP)
        graph, *rows = f"{self.name} mlp_graph", "MLP", *(f"rows {shard}" for shard in range(len(self.shards)))
        mlp = Visit(
            f"{self.mlp_name} backward", self.mlp, parts, backward=True, host=self.mlp_host, gives=(*rows, graph)
        )
        calls = [*self._shard_visits(backward=True), mlp]
        if self.travels:
            # The shared expert's backward runs first, beside the exchange; the last shard's rows are summed at once.
            leave = _compute(0.0, "tokens leave"), _exchange(EP, self.work.travel(2), "tokens and gradients come")
            *shards, last = calls[:-1]
            mlp = replace(mlp, parts=(*leave, *parts), gives=(graph,), brings=self.brought)
            last = replace(last, leaves={}, gives=tuple(name for name in rows if name != "rows 0"))
            calls = [mlp, *shards, last]
        calls[0] = replace(calls[0], takes={"MLP": self.mlp_backward})
        yield from calls
        held = ["graph", "kept", "input"]
        if self.again:
            held += ["route"] * (not self.dense) + ["joined"] * self.mtp
        yield Visit(
            f"{self.name} attention backward",
            self.attention,
            self._attention_backward(),
            backward=True,
            during=tensors.backward_attention,
            gives=tuple(f"{self.name} {what}" for what in held),
        )

    def _recomputation(self, ahead: Mapping[str, Line]) -> Iterator[Visit]:
        """Without the last projection of each half where nothing needs its result."""
        tensors, recomputed = self.tensors, self.settings.attention_output == "recompute"
        kept = self._own(KEPT, kept=tensors.kept_kernel) if recomputed else {}
        if self.mtp:
            kept |= self._own(LAYER, joined=tensors.joined)
        yield Visit(
            f"{self.name} attention again",
            self.attention if recomputed else self.attention[:-1],
            self._attention_parts(kept=not recomputed),
            takes=self._own(LAYER, graph=tensors.graph_attention) | kept,
            fetches=ahead,
            awaits=tuple(self.waiting),
        )
        yield Visit(
            f"{self.mlp_name} again",
            self.mlp[:-1],
            self._mlp_parts(self.mlp[:-1], 1, ELEMENTWISE_FORWARD),
            host=self.mlp_host,
            takes=self._own(LAYER, mlp_graph=self.mlp_graph),
        )
