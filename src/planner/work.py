"""One layer's and the head's work on one rank: seconds from measured rates, bytes from the code's own tensors.

A micro-step has T tokens a rank; under SP a rank computes heads / SP over SP x T tokens, so T x heads stays. Bytes are
those of src/models/deepseek_v3: attention.py, moe.py, experts.py and src/models/loss.py; each says which tensors.
"""

from typing import NamedTuple

from src.planner.cluster import Cluster
from src.planner.rates import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    ELEMENTWISE,
    EXPERTS_BACKWARD,
    EXPERTS_FORWARD,
    HEAD,
    LAUNCH,
    PRODUCTS,
    REFERENCE_TFLOPS,
    SKEW,
    interpolate,
)
from src.planner.settings import Settings

CHUNK, GRAD_CHUNKS, TILE = 2**27, 4, 256  # of src/models/loss.py; a test compares them


class Bytes(NamedTuple):
    """Device bytes, with the tensors that they are."""

    nbytes: float
    why: str


class Work:
    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self.settings, self.cluster = settings, cluster
        self.factor = REFERENCE_TFLOPS / cluster.matmul_tflops

    # -- seconds ------------------------------------------------------------------------------------------------------

    def _products(self, weights: float, tokens: float) -> float:
        return self.factor * 2 * weights * tokens / (PRODUCTS * 1e12)

    def attention(self, backward: bool) -> float:
        """Scores and values of this rank's heads over the whole row, causal; the backward counts twice the forward."""
        s = self.settings
        tokens, n = s.row_tokens, min(s.document, s.max_length)
        flops = tokens * n * (s.sizes.heads / s.sp) * (s.sizes.nope + s.sizes.rope + s.sizes.value)
        table = (ATTENTION_BACKWARD if backward else ATTENTION_FORWARD)[s.attention_kernel]
        return self.factor * flops * (2 if backward else 1) / (interpolate(table, n) * 1e12)

    def down(self) -> float:
        """Projections of this rank's tokens to the latents, forward."""
        s = self.settings.sizes
        return self._products(s.hidden * ((s.query_rank or 0) + s.kv_rank + s.rope), self.settings.tokens)

    def up(self) -> float:
        """Projections to this rank's heads, forward."""
        s = self.settings.sizes
        weights = sum(s.attention[:-1]) - s.hidden * ((s.query_rank or 0) + s.kv_rank + s.rope)
        return self._products(weights, self.settings.tokens)

    def out(self) -> float:
        return self._products(self.settings.sizes.attention[-1], self.settings.tokens)

    def mlp(self, dense: bool) -> float:
        return self._products(sum(self.settings.sizes.mlp(dense)), self.settings.tokens)

    def elementwise(self) -> float:
        """What passes through memory in a layer, forward and backward, and the launches."""
        return self.factor * (ELEMENTWISE * self.settings.tokens * self.settings.sizes.hidden + LAUNCH)

    def experts(self, backward: bool) -> float:
        """All of a layer's, dispatch and combine included."""
        s, tokens = self.settings.sizes, self.settings.tokens
        flops = 2 * tokens * s.top_k * 3 * s.hidden * s.expert_width
        rate = interpolate(EXPERTS_BACKWARD if backward else EXPERTS_FORWARD, tokens * s.top_k / s.experts)
        return self.factor * flops * (2 if backward else 1) / (rate * 1e12)

    def head(self) -> float:
        """Projection, loss and both gradients, all in the forward pass."""
        s = self.settings.sizes
        tokens = self.settings.tokens * (2 if s.mtp else 1)
        return self.factor * 6 * tokens * s.hidden * s.vocab / (HEAD * 1e12)

    def exchange(self, elements_received: float) -> float:
        """An SP collective; `elements_received` by a rank."""
        s = self.settings
        if s.sp == 1:
            return 0.0
        inside = s.sp <= s.gpus
        bandwidth = self.cluster.nccl_intra_node_gb_s if inside else self.cluster.nccl_inter_node_gb_s
        return elements_received * s.param_bytes / (bandwidth * 1e9) + 20e-6 + 1e-6 * s.sp + self._skew()

    def _skew(self) -> float:
        """What each of a layer's six exchanges waits for the slowest rank of the group."""
        products = 3 * (self.down() + self.up() + self.out() + self.mlp(dense=False))
        layer = sum(self.attention(b) + self.experts(b) for b in (False, True)) + products + self.elementwise()
        return SKEW * layer / 6

    def latents(self) -> float:
        s = self.settings
        return self.exchange(s.tokens * s.sizes.latents * (s.sp - 1))

    def outputs(self) -> float:
        s = self.settings
        return self.exchange(s.tokens * s.sizes.heads * s.sizes.value * (s.sp - 1) / s.sp)

    # -- bytes --------------------------------------------------------------------------------------------------------

    def _bytes(self, elements: float, why: str) -> Bytes:
        """Elements a token of the parameters' dtype."""
        s = self.settings
        nbytes = elements * s.param_bytes * s.tokens
        return Bytes(nbytes, f"{s.tokens:,} tokens x {elements * s.param_bytes / 1024:.1f} KiB: {why}")

    def _widths(self) -> tuple[int, int, int]:
        """Elements a token of queries (or keys), of keys and values together, of the output."""
        s = self.settings.sizes
        return s.heads * (s.nope + s.rope), s.heads * (s.nope + s.value), s.heads * s.value

    @property
    def _latent_elements(self) -> int:
        return self.settings.sizes.latents * (1 + (self.settings.sp if self.settings.sp > 1 else 0))

    def layer_input(self) -> Bytes:
        return self._bytes(self.settings.sizes.hidden, "a layer's input")

    def kept_output(self) -> Bytes:
        """Attention's output and log-sums (fp32, a head), and the output projection's result."""
        s = self.settings
        out = self._widths()[2] + s.sizes.hidden + s.sizes.heads * 4 / s.param_bytes
        return self._bytes(out, "attention's output, its log-sums and the output projection")

    def route(self) -> Bytes:
        """Chosen experts, order, tokens, slots and shards of each row, int64, kept over the recomputation."""
        a_token = 5 * 8 * self.settings.sizes.top_k
        return Bytes(
            self.settings.tokens * a_token, f"{self.settings.tokens:,} tokens x {a_token} bytes: a layer's route"
        )

    def forward_attention(self) -> Bytes:
        query, key_value, out = self._widths()
        exchanged = out if self.settings.sp > 1 else 0
        elements = 2 * query + key_value + out + exchanged + self._latent_elements + 2 * self.settings.sizes.hidden
        return self._bytes(elements, "queries, keys, keys and values, output, latents, normed input, projection")

    def forward_experts(self) -> Bytes:
        s = self.settings.sizes
        elements = 3 * s.hidden + s.top_k * s.hidden + self._shard_rows(s.hidden + 3 * s.expert_width)
        return self._bytes(elements, "all shards' rows out, residual and normed input, one shard's rows")

    def _shard_rows(self, width: float) -> float:
        """Elements a token: a shard's rows are tokens x top_k / shards."""
        s = self.settings.sizes
        return s.top_k / s.shards * width

    def forward_dense(self) -> Bytes:
        s = self.settings.sizes
        return self._bytes(3 * s.hidden + 3 * s.dense_width, "gate, up, product, residual and normed input")

    def graph_attention(self) -> Bytes:
        """What the recomputation leaves for the backward of attention."""
        query, key_value, out = self._widths()
        exchanged = out if self.settings.sp > 1 else 0
        elements = 2 * query + key_value + exchanged + self._latent_elements + 2 * self.settings.sizes.hidden
        return self._bytes(elements, "queries, keys, keys and values, latents, normed input, residual")

    def graph_mlp(self, dense: bool) -> Bytes:
        s = self.settings.sizes
        if dense:
            return self._bytes(s.hidden + 3 * s.dense_width, "gate, up and their product, normed input")
        scores = 3 * s.experts * 4 / self.settings.param_bytes
        width = 3 * s.expert_width * s.shared
        return self._bytes(s.hidden + width + scores, "shared expert's gate, up and product, normed input, affinities")

    def shard_activations(self) -> Bytes:
        """Before a shard's last three products: its rows and their gradient, gate_up and its gradient, both hidden."""
        s = self.settings.sizes
        return self._bytes(self._shard_rows(2 * s.hidden + 6 * s.expert_width), "one shard's rows and activations")

    def shard_backward(self) -> Bytes:
        """Beside the gradients of its weights: rows, their gradient and the result's, gate_up's gradient, hidden."""
        s = self.settings.sizes
        return self._bytes(self._shard_rows(3 * s.hidden + 3 * s.expert_width), "one shard's rows and their gradients")

    def shard_gradient(self) -> Bytes:
        """What a shard leaves until the layer's rows are summed."""
        s = self.settings.sizes
        return self._bytes(self._shard_rows(s.hidden), "a shard's gradient rows")

    def backward_dense(self) -> Bytes:
        s = self.settings.sizes
        return self._bytes(2 * s.hidden + 3 * s.dense_width, "gradients of gate, up and product, of output and input")

    def backward_attention(self) -> Bytes:
        """Gradients of output, queries, keys and values, and the kernel's fp32 sum of the queries' gradient."""
        query, _, out = self._widths()
        elements = 2 * out + 2 * query + query * 4 / self.settings.param_bytes
        if self.settings.attention_kernel == "varlen":  # V and the output padded to the key's width, and run again
            elements += 4 * query - 2 * out
        return self._bytes(elements, "gradients of output, queries, keys, values, and an fp32 sum of the queries'")

    def head_work(self) -> list[tuple[str, Bytes]]:
        s, settings = self.settings.sizes, self.settings
        tokens = settings.tokens * (2 if s.mtp else 1)
        chunk = max(1, CHUNK // s.vocab)
        chunk = min(tokens, chunk // TILE * TILE or chunk)
        group = min(tokens, GRAD_CHUNKS * chunk)
        hidden = 3 * tokens * s.hidden * settings.param_bytes
        return [
            ("fp32 gradient of the head", Bytes(4 * s.embedding, f"{s.vocab:,} x {s.hidden:,} x 4 bytes")),
            ("logits of a chunk", Bytes(4 * chunk * s.vocab, f"{chunk:,} tokens x {s.vocab:,} x 4 bytes")),
            (
                "gradients of logits",
                Bytes(
                    settings.param_bytes * group * s.vocab,
                    f"{group:,} tokens x {s.vocab:,} x {settings.param_bytes} bytes",
                ),
            ),
            ("hidden states of the targets", Bytes(hidden, f"{tokens:,} tokens x {s.hidden:,}, three times")),
        ]
