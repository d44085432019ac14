"""The micro-step, written once: every call of a module in its order, with its weights, its work and its memory.

`micro_step` lays it out on the streams of the GPU, `zero` gathers and reduces for it, and the ledger counts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from src.models.deepseek_v3.sizes import attention_weights, mlp_weights
from src.planner.ledger import INPUTS, KEPT, LAYER, LOSS, Line
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
from src.planner.streams import COMPUTE, EP, SP
from src.planner.work import Work


class Part(NamedTuple):
    """Of a visit's work; beside: as `Op`'s."""

    stream: str
    seconds: float
    what: str = ""
    beside: tuple[float, float] = PRODUCTS_BESIDE


@dataclass(frozen=True)
class Visit:
    """One call of a module, or of its backward. Memory is by name, with the line of the account that it belongs to.

    params: the weights that it uses, and their elements; experts: of a shard of experts. parts: its work, one
    after the other. backward: its weights' gradients come out. syncs: the host waits for its end. host: seconds that
    the host needs besides those of its weights.
    takes: allocated before its weights are fetched. during: there until gradients come out; beside: until all are.
    gives: freed behind it; leaves: allocated behind it; stows: copied to the host behind it, in bytes.
    fetches: fetched from the host behind it; awaits: fetched before it, and used here.
    """

    name: str
    params: Mapping[str, int]
    parts: tuple[Part, ...] = (Part(COMPUTE, 0.0),)
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
    experts: bool = False


def visits(settings: Settings, work: Work) -> Iterator[Visit]:
    """Forward and backward of one micro-step."""
    s = settings.sizes
    layers = [_Layer(settings, work, index) for index in range(s.layers)]
    embedding, head = {"embedding": s.embedding}, {"head": s.embedding}
    yield Visit("embedding", embedding)
    for layer in layers:
        yield from layer.forward()
    loss = {what: Line(LOSS, *size) for what, size in work.head_work().items()}
    logits = ("logits of a chunk", "gradients of logits")
    yield Visit("head and loss", head, (Part(COMPUTE, work.head()),), takes=loss, gives=logits)
    between = "gradient between layers"
    yield Visit(
        "head backward",
        head,
        backward=True,
        gives=tuple(what for what in loss if what not in logits),
        leaves={between: Line(LAYER, *work.layer_input())},
        fetches=layers[-1].waiting(),
    )
    for layer in reversed(layers):
        yield from layer.backward(layers[layer.index - 1].waiting() if layer.index else {})
    yield Visit("embedding backward", embedding, backward=True, gives=(between,))


class _Layer:
    def __init__(self, settings: Settings, work: Work, index: int) -> None:
        s = settings.sizes
        self.mtp = mtp = index == s.num_hidden_layers
        self.settings, self.work, self.index = settings, work, index
        self.dense, self.again = s.dense(index), settings.activation_checkpointing
        self.name = "MTP block" if mtp else f"layer {index}"
        self.mlp_name = f"{self.name} {'MLP' if self.dense else 'router, shared'}"
        self.inputs = work.layer_input(2 if mtp else 1)
        projections = ({"eh_proj": 2 * s.hidden_size**2} if mtp else {}) | attention_weights(s)
        self.attention = {f"{self.name} {name}": size for name, size in projections.items()}
        self.mlp = {f"{self.name} {name}": size for name, size in mlp_weights(s, self.dense).items()}
        self._host = 0.0 if self.dense else HOST_ROUTE
        self.shards = [
            {f"{self.name} shard {shard} {name}": size for name, size in s.shard.items()}
            for shard in range(0 if self.dense else s.shards // settings.ep)
        ]

    def _own(self, line: str, **sizes: tuple[float, str]) -> dict[str, Line]:
        """Memory of this layer by name."""
        return {f"{self.name} {name}": Line(line, *size) for name, size in sizes.items()}

    # -- work ---------------------------------------------------------------------------------------------------------

    def _elementwise(self, share: float) -> float:
        return share * self.work.elementwise()

    def _attention_parts(self, kept: bool) -> tuple[Part, ...]:
        """Forward, or its recomputation, of which the kernel and the output projection may be kept."""
        work = self.work
        return (
            Part(COMPUTE, work.down() + self._elementwise(ELEMENTWISE_FORWARD), "latents"),
            Part(SP, work.latents(), "latents exchanged"),
            Part(COMPUTE, work.up(), "heads"),
            Part(COMPUTE, 0.0 if kept else work.attention(False), "scores and values", ATTENTION_BESIDE),
            Part(SP, work.outputs(), "outputs exchanged"),
            Part(COMPUTE, 0.0 if kept else work.out(), "output projection"),
        )

    def _attention_backward(self) -> tuple[Part, ...]:
        work = self.work
        return (
            Part(COMPUTE, 2 * work.out(), "output projection"),
            Part(SP, work.outputs(), "gradients of outputs exchanged"),
            Part(COMPUTE, work.attention(True), "scores and values", ATTENTION_BESIDE),
            Part(COMPUTE, 2 * work.up() + self._elementwise(ELEMENTWISE_BACKWARD_ATTENTION), "heads"),
            Part(SP, work.latents(), "gradients of latents exchanged"),
            Part(COMPUTE, 2 * work.down(), "latents"),
        )

    def _mlp_part(self, weights: int, elementwise: float) -> tuple[Part, ...]:
        return (Part(COMPUTE, self.work.products(weights) + self._elementwise(elementwise)),)

    def _shard_parts(self, shard: int, backward: bool) -> tuple[Part, ...]:
        """Before the first that runs tokens come, in the backward beside gradients; behind the last they return."""
        work, runs = self.work, list(range(len(self.shards)))[:: -1 if backward else 1]
        come = Part(EP, work.travel(2 if backward else 1) if shard == runs[0] else 0.0, "tokens come")
        leave = Part(EP, work.travel(1) if shard == runs[-1] else 0.0, "sums return")
        return (come, Part(COMPUTE, work.experts(backward) / len(self.shards), beside=EXPERTS_BESIDE), leave)

    # -- visits -------------------------------------------------------------------------------------------------------

    def forward(self) -> Iterator[Visit]:
        s, work = self.settings, self.work
        offloads = self.again and s.attention_output == "offload"
        kept = self._own(KEPT, kept=work.kept_output()) if not self.again or s.attention_output == "keep" else {}
        if not self.again:
            kept |= self._own(KEPT, graph=work.graph_attention(), mlp_graph=work.graph_mlp(self.dense))
        yield Visit(
            f"{self.name} attention",
            self.attention,
            self._attention_parts(kept=False),
            takes=self._own(INPUTS, input=self.inputs) | {"attention": Line(LAYER, *work.forward_attention())},
            gives=("attention",),
            leaves=kept,
            stows={f"{self.name} attention output": work.kept_output().nbytes} if offloads else {},
        )
        route = self._own(KEPT, route=work.route()) if self.again and not self.dense else {}
        used = work.forward_dense() if self.dense else work.forward_experts()
        calls = [
            Visit(
                self.mlp_name,
                self.mlp,
                self._mlp_part(sum(self.mlp.values()), ELEMENTWISE_FORWARD),
                takes=route | {"MLP": Line(LAYER, *used)},
                syncs=not self.dense,  # for the route, without which it cannot call the shards
                host=self._host,
            )
        ]
        for shard, params in enumerate(self.shards):
            parts = self._shard_parts(shard, False)
            calls.append(Visit(f"{self.name} shard {shard}", params, parts, host=HOST_SHARD, experts=True))
        leaving = {f"{self.name} input": self.inputs.nbytes} if self.again and s.layer_input == "offload" else {}
        calls[-1] = replace(calls[-1], gives=("MLP", *leaving), stows=leaving)
        yield from calls

    def waiting(self) -> dict[str, Line]:
        """What this layer left in host memory: src/models/offload.py fetches all that one layer leaves ahead."""
        s = self.settings
        kept = self._own(KEPT, kept=self.work.kept_output()) if s.attention_output == "offload" else {}
        inputs = self._own(INPUTS, input=self.inputs) if s.layer_input == "offload" else {}
        return kept | inputs if self.again else {}

    def backward(self, ahead: Mapping[str, Line]) -> Iterator[Visit]:
        """ahead: what is fetched from the host for the layer whose backward comes next."""
        work = self.work
        used = Line(LAYER, *(work.backward_dense() if self.dense else work.backward_experts()))
        if self.again:
            yield from self._recomputation(ahead)
        calls = []
        for shard, params in reversed(list(enumerate(self.shards))):
            calls.append(
                Visit(
                    f"{self.name} shard {shard} backward",
                    params,
                    self._shard_parts(shard, True),
                    backward=True,
                    host=HOST_SHARD,
                    during=Line(LAYER, *work.shard_activations()),
                    beside=Line(LAYER, *work.shard_backward()),
                    leaves={f"rows {shard}": Line(LAYER, *work.shard_gradient())},
                    experts=True,
                )
            )
        calls.append(
            Visit(
                f"{self.mlp_name} backward",
                self.mlp,
                self._mlp_part(2 * sum(self.mlp.values()), ELEMENTWISE_BACKWARD_MLP),
                backward=True,
                host=self._host,
                gives=(*(f"rows {shard}" for shard in range(len(self.shards))), "MLP", f"{self.name} mlp_graph"),
            )
        )
        calls[0] = replace(calls[0], takes={"MLP": used})
        yield from calls
        held = ["graph", "kept", "input"]
        if self.again:
            held += ["route"] * (not self.dense) + ["joined"] * self.mtp
        yield Visit(
            f"{self.name} attention backward",
            self.attention,
            self._attention_backward(),
            backward=True,
            during=Line(LAYER, *work.backward_attention()),
            gives=tuple(f"{self.name} {what}" for what in held),
        )

    def _recomputation(self, ahead: Mapping[str, Line]) -> Iterator[Visit]:
        work, recomputed = self.work, self.settings.attention_output == "recompute"
        kept = self._own(KEPT, kept=work.kept_output(projection=False)) if recomputed else {}
        if self.mtp:
            kept |= self._own(LAYER, joined=work.joined())
        yield Visit(
            f"{self.name} attention again",
            self.attention if recomputed else _without_last(self.attention),
            self._attention_parts(kept=not recomputed),
            takes=self._own(LAYER, graph=work.graph_attention()) | kept,
            fetches=ahead,
            awaits=tuple(self.waiting()),
        )
        again = _without_last(self.mlp)
        yield Visit(
            f"{self.mlp_name} again",
            again,
            self._mlp_part(sum(again.values()), ELEMENTWISE_FORWARD),
            host=self._host,
            takes=self._own(LAYER, mlp_graph=work.graph_mlp(self.dense)),
        )


def _without_last(params: Mapping[str, int]) -> dict[str, int]:
    """Without the projection that a recomputation leaves out, whose result nothing needs."""
    return dict(list(params.items())[:-1])
