"""One layer's and the head's work on one rank: seconds from measured rates, bytes from the code's own tensors.

A micro-step has T tokens a rank; under SP a rank computes heads / SP over SP x T tokens, so T x heads stays. Bytes are
those of src/models/deepseek_v3: attention.py, moe.py, experts.py and src/models/loss.py; each says which tensors.
"""

from math import comb
from typing import NamedTuple

from src.models.deepseek_v3.sizes import attention_output_bytes, attention_weights, layer_input_bytes, mlp_weights
from src.models.loss_chunks import GRAD_CHUNKS, chunk_tokens
from src.planner import rates
from src.planner.cluster import Cluster
from src.planner.rates import interpolate
from src.planner.settings import Settings


class Bytes(NamedTuple):
    """Device bytes, with the tensors that they are."""

    nbytes: float
    why: str


class Work:
    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self.settings, self.cluster, self.sizes = settings, cluster, settings.sizes
        self.tokens = settings.tokens
        s = self.sizes
        self.hidden, self.inner = s.hidden_size, s.moe_intermediate_size
        # Elements a token of queries (or keys), of keys and values together, of attention's output.
        self.query = s.num_attention_heads * (s.qk_nope_head_dim + s.qk_rope_head_dim)
        self.key_value = s.num_attention_heads * (s.qk_nope_head_dim + s.v_head_dim)
        self.output = s.num_attention_heads * s.v_head_dim
        self.targets = self.tokens * (2 if s.mtp else 1)  # tokens through the head

    # -- seconds ------------------------------------------------------------------------------------------------------

    def products(self, weights: float) -> float:
        """Seconds of multiplying every token of this rank with so many weights."""
        return self.cluster.kernels * 2 * weights * self.tokens / (rates.PRODUCTS * 1e12)

    def attention(self, backward: bool) -> float:
        """Scores and values of this rank's heads over the whole row, causal; the backward counts twice the forward."""
        s, kernel = self.settings, self.settings.attention_kernel
        n = min(s.document, s.max_length)
        width = (self.query + self.output) / self.sizes.num_attention_heads
        flops = s.row_tokens * n * (self.sizes.num_attention_heads / s.sp) * width
        table = (rates.ATTENTION_BACKWARD if backward else rates.ATTENTION_FORWARD)[kernel]
        slower = self.cluster.varlen if kernel == "varlen" else self.cluster.kernels
        return slower * flops * (2 if backward else 1) / (interpolate(table, n) * 1e12)

    def _down_weights(self) -> int:
        s = self.sizes
        return s.hidden_size * ((s.q_lora_rank or 0) + s.kv_lora_rank + s.qk_rope_head_dim)

    def down(self) -> float:
        """Projections of this rank's tokens to the latents, forward."""
        return self.products(self._down_weights())

    def up(self) -> float:
        """Projections to this rank's heads, forward."""
        weights = attention_weights(self.sizes)
        return self.products(sum(weights.values()) - weights["o_proj"] - self._down_weights())

    def out(self) -> float:
        return self.products(attention_weights(self.sizes)["o_proj"])

    def mlp(self, dense: bool) -> float:
        return self.products(sum(mlp_weights(self.sizes, dense).values()))

    def elementwise(self) -> float:
        """What passes through memory in a layer, forward and backward, and the launches."""
        return self.cluster.elementwise * (rates.ELEMENTWISE * self.tokens * self.hidden + rates.LAUNCH)

    def experts(self, backward: bool) -> float:
        """All of a layer's that are here, dispatch and combine included; of the busiest rank."""
        rows = self.tokens * self.sizes.num_experts_per_tok
        table = rates.EXPERTS_BACKWARD if backward else rates.EXPERTS_FORWARD
        rate = interpolate(table, self.settings.ep * rows / self.sizes.n_routed_experts)
        flops = 2 * rows * self.imbalance * 3 * self.hidden * self.inner
        return self.cluster.kernels * flops * (2 if backward else 1) / (rate * 1e12)

    @property
    def imbalance(self) -> float:
        return self.settings.imbalance if self.settings.ep > 1 else 1.0

    @property
    def reach(self) -> float:
        """Ranks of a group that have one of a token's experts, the mean of even choices; 0 without such groups."""
        s, ep = self.sizes, self.settings.ep
        if ep == 1:
            return 0.0
        groups = max(1, s.n_group // ep)  # of experts, with a part on a rank
        part, chosen = s.n_routed_experts // max(ep, s.n_group), s.n_routed_experts * s.topk_group // s.n_group
        missed = 0.0
        for n in range(min(groups, s.topk_group) + 1):  # of a rank's groups among the chosen
            likely = comb(groups, n) * comb(s.n_group - groups, s.topk_group - n) / comb(s.n_group, s.topk_group)
            missed += likely * comb(chosen - n * part, s.num_experts_per_tok) / comb(chosen, s.num_experts_per_tok)
        return ep * (1 - missed)

    def travel(self, rows: int) -> float:
        """An exchange in an EP group: so many rows of the hidden width for each token and rank that it reaches."""
        s = self.settings
        if s.ep == 1:
            return 0.0
        elements = rows * self.tokens * self.reach * self.imbalance * self.hidden * (s.ep - 1) / s.ep
        bandwidth = self.cluster.exchange_intra_node_gb_s if s.ep <= s.gpus else self.cluster.nccl_inter_node_gb_s
        latency = rates.COLLECTIVE + rates.COLLECTIVE_RANK * s.ep
        return elements * s.param_bytes / (bandwidth * 1e9) + latency

    def head(self) -> float:
        """Projection, loss and both gradients, all in the forward pass."""
        return self.cluster.kernels * 6 * self.targets * self.hidden * self.sizes.vocab_size / (rates.HEAD * 1e12)

    def exchange(self, elements_received: float) -> float:
        """An SP collective; `elements_received` by a rank."""
        s = self.settings
        if s.sp == 1:
            return 0.0
        inside = s.sp <= s.gpus
        bandwidth = self.cluster.exchange_intra_node_gb_s if inside else self.cluster.nccl_inter_node_gb_s
        latency = rates.COLLECTIVE + rates.COLLECTIVE_RANK * s.sp
        return elements_received * s.param_bytes / (bandwidth * 1e9) + latency + self._skew()

    def _skew(self) -> float:
        """What each of a layer's six exchanges waits for the slowest rank of the group."""
        products = 3 * (self.down() + self.up() + self.out() + self.mlp(dense=False))
        layer = sum(self.attention(b) + self.experts(b) for b in (False, True)) + products + self.elementwise()
        return rates.SKEW * layer / 6

    def latents(self) -> float:
        return self.exchange(self.tokens * self.sizes.latents * (self.settings.sp - 1))

    def outputs(self) -> float:
        sp = self.settings.sp
        return self.exchange(self.tokens * self.output * (sp - 1) / sp)

    # -- bytes --------------------------------------------------------------------------------------------------------

    def _bytes(self, elements: float, why: str) -> Bytes:
        """Elements a token of the parameters' dtype."""
        a_token = elements * self.settings.param_bytes
        return Bytes(a_token * self.tokens, f"{self.tokens:,} tokens x {a_token / 1024:.1f} KiB: {why}")

    @property
    def _latent_elements(self) -> int:
        return self.sizes.latents * (1 + (self.settings.sp if self.settings.sp > 1 else 0))

    @property
    def _exchanged(self) -> int:
        """Attention's output once more, on its way through SP."""
        return self.output if self.settings.sp > 1 else 0

    def layer_input(self, count: int = 1) -> Bytes:
        """`count`: the multi-token prediction's block has two."""
        b = self.settings.param_bytes
        one = self._bytes(layer_input_bytes(self.sizes, b) / b, "a layer's input")
        return one._replace(nbytes=count * one.nbytes)

    def kept_output(self, projection: bool = True) -> Bytes:
        """Attention's output and log-sums (fp32, a head), and the output projection's result."""
        b = self.settings.param_bytes
        out = attention_output_bytes(self.sizes, b) / b
        if not projection:
            return self._bytes(out - self.hidden, "attention's output and its log-sums")
        return self._bytes(out, "attention's output, its log-sums and the output projection")

    def joined(self) -> Bytes:
        """What the multi-token prediction's block has besides: its two inputs side by side, the main model's output
        before its norm, and the gradient of that output, which waits."""
        return self._bytes(4 * self.hidden, "two inputs side by side, the main model's output and its gradient")

    def route(self) -> Bytes:
        """Chosen experts, order, tokens, slots and shards of each row, int64, kept over the recomputation."""
        top_k, ep = self.sizes.num_experts_per_tok, self.settings.ep
        a_token = 5 * 8 * top_k
        if ep > 1:  # as src/models/deepseek_v3/expert_parallel.py: of what is received, and of what is sent
            received = 20 * top_k * self.reach + 16 * top_k * self.imbalance
            a_token = round(received + 8 * self.reach + 16 * ep + 16 * top_k)
        return Bytes(self.tokens * a_token, f"{self.tokens:,} tokens x {a_token} bytes: a layer's route")

    def forward_attention(self) -> Bytes:
        elements = 2 * self.query + self.key_value + self.output + self._exchanged + self._latent_elements
        return self._bytes(
            elements + 2 * self.hidden, "queries, keys, keys and values, output, latents, normed input, projection"
        )

    def forward_experts(self) -> Bytes:
        rows = self.imbalance * self.sizes.num_experts_per_tok * self.hidden
        rows += self._shard_rows(self.hidden + 3 * self.inner) + 2 * self._received
        also = ", tokens received and sums to return" if self.settings.ep > 1 else ""
        why = f"all shards' rows out, residual and normed input, one shard's rows{also}"
        return self._bytes(3 * self.hidden + rows, why)

    @property
    def _received(self) -> float:
        """Elements a token of what a rank receives of all ranks' tokens."""
        return self.imbalance * self.reach * self.hidden

    def backward_experts(self) -> Bytes:
        """There all the while: the output's gradient, and where ranks share the experts what they have received."""
        if self.settings.ep == 1:
            return self.layer_input()
        elements = self.hidden + 2 * self._received
        return self._bytes(elements, "the output's gradient, tokens and gradients received")

    def _shard_rows(self, width: float) -> float:
        """Elements a token: a shard's rows are tokens x top_k / shards, of those that are here."""
        return self.imbalance * self.sizes.num_experts_per_tok * self.settings.ep / self.sizes.shards * width

    def forward_dense(self) -> Bytes:
        elements = 3 * self.hidden + 3 * self.sizes.intermediate_size
        return self._bytes(elements, "gate, up, product, residual and normed input")

    def graph_attention(self) -> Bytes:
        """What the recomputation leaves for the backward of attention."""
        elements = 2 * self.query + self.key_value + self._exchanged + self._latent_elements + 2 * self.hidden
        return self._bytes(elements, "queries, keys, keys and values, latents, normed input, residual")

    def graph_mlp(self, dense: bool) -> Bytes:
        if dense:
            elements = self.hidden + 3 * self.sizes.intermediate_size
            return self._bytes(elements, "gate, up and their product, normed input")
        scores = 3 * self.sizes.n_routed_experts * 4 / self.settings.param_bytes
        width = 3 * self.inner * self.sizes.n_shared_experts
        return self._bytes(
            self.hidden + width + scores, "shared expert's gate, up and product, normed input, affinities"
        )

    def shard_activations(self) -> Bytes:
        """Before a shard's last three products: its rows and their gradient, gate_up and its gradient, both hidden."""
        return self._bytes(self._shard_rows(2 * self.hidden + 6 * self.inner), "one shard's rows and activations")

    def shard_backward(self) -> Bytes:
        """Beside the gradients of its weights: rows, their gradient and the result's, gate_up's gradient, hidden."""
        return self._bytes(self._shard_rows(3 * self.hidden + 3 * self.inner), "one shard's rows and their gradients")

    def shard_gradient(self) -> Bytes:
        """What a shard leaves until the layer's rows are summed."""
        return self._bytes(self._shard_rows(self.hidden), "a shard's gradient rows")

    def backward_dense(self) -> Bytes:
        elements = 2 * self.hidden + 3 * self.sizes.intermediate_size
        return self._bytes(elements, "gradients of gate, up and product, of output and input")

    def backward_attention(self) -> Bytes:
        """Gradients of output, queries, keys and values, and the kernel's fp32 sum of the queries' gradient."""
        elements = 2 * self.output + 2 * self.query + self.query * 4 / self.settings.param_bytes
        if self.settings.attention_kernel == "varlen":  # V and the output padded to the key's width, and run again
            elements += 4 * self.query - 2 * self.output
        return self._bytes(elements, "gradients of output, queries, keys, values, and an fp32 sum of the queries'")

    def head_work(self) -> dict[str, Bytes]:
        vocab, tokens, b = self.sizes.vocab_size, self.targets, self.settings.param_bytes
        chunk = min(tokens, chunk_tokens(vocab))
        group = min(tokens, GRAD_CHUNKS * chunk)
        return {
            "fp32 gradient of the head": Bytes(4 * self.sizes.embedding, f"{vocab:,} x {self.hidden:,} x 4 bytes"),
            "logits of a chunk": Bytes(4 * chunk * vocab, f"{chunk:,} tokens x {vocab:,} x 4 bytes"),
            "gradients of logits": Bytes(b * group * vocab, f"{group:,} tokens x {vocab:,} x {b} bytes"),
            "hidden states of the targets": Bytes(
                3 * tokens * self.hidden * b, f"{tokens:,} tokens x {self.hidden:,}, three times"
            ),
        }
