"""Bytes of one layer's and the head's tensors on one rank.

They are those of src/models/deepseek_v3 (attention.py, moe.py, experts.py) and src/models/loss.py; lines say which.
"""

from src.models.deepseek_v3.sizes import MOST_RECEIVED, attention_output_bytes, layer_input_bytes
from src.models.loss_chunks import GRAD_CHUNKS, chunk_tokens
from src.planner.ledger import LAYER, LOSS, Line
from src.planner.settings import Settings


class Tensors:
    """`Line.name` is the work of one layer; where a tensor is kept, the caller counts it elsewhere."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.sizes = settings, settings.sizes
        s, sp = settings.sizes, settings.sp
        self.tokens, self.hidden, self.inner = settings.tokens, s.hidden_size, s.moe_intermediate_size
        # Elements per token of queries (or keys), of keys and values together, of attention's output.
        self.query = s.num_attention_heads * (s.qk_nope_head_dim + s.qk_rope_head_dim)
        self.key_value = s.num_attention_heads * (s.qk_nope_head_dim + s.v_head_dim)
        self.output = s.num_attention_heads * s.v_head_dim
        # Of latents, a rank's own and the group's; of attention's output once more, on its way through SP.
        self.latents, self.exchanged = s.latents * (1 + (sp if sp > 1 else 0)), self.output if sp > 1 else 0
        # Of what a rank receives at once of the tokens of its EP group, whatever these have chosen.
        self.received = min(MOST_RECEIVED * settings.reach, settings.ep) * self.hidden

    def _line(self, elements: float, why: str) -> Line:
        """Elements per token, of the weights' type."""
        a_token = elements * self.settings.param_bytes
        return Line(LAYER, a_token * self.tokens, f"{self.tokens:,} tokens x {a_token / 1024:.1f} KiB: {why}")

    # -- kept from the forward pass to the backward -------------------------------------------------------------------

    def layer_input(self) -> Line:
        b = self.settings.param_bytes
        return self._line(layer_input_bytes(self.sizes, b) / b, "a layer's input")

    def kept_output(self, projection: bool = True) -> Line:
        """Attention's output and log-sums (fp32, a head), and the output projection's result."""
        b = self.settings.param_bytes
        out = attention_output_bytes(self.sizes, b) / b
        if not projection:
            return self._line(out - self.hidden, "attention's output and its log-sums")
        return self._line(out, "attention's output, its log-sums and the output projection")

    def joined(self) -> Line:
        """Besides, in the multi-token prediction's block: its two inputs side by side, the main model's output before
        its norm, and the gradient of that output, which waits."""
        return self._line(4 * self.hidden, "two inputs side by side, the main model's output and its gradient")

    def route(self) -> Line:
        """Chosen experts, order, tokens, slots and shards of each row, kept over the recomputation; int32, and counted
        twice where each rank has all experts."""
        s, top_k = self.settings, self.sizes.num_experts_per_tok
        a_token = 5 * 8 * top_k
        if s.ep > 1:  # as src/models/deepseek_v3/expert_parallel.py: of what is received, and of what is sent
            received = 12 * top_k * s.reach + 8 * top_k * s.load
            a_token = round(received + 4 * s.reach + 8 * s.ep + 8 * top_k)
        return Line(LAYER, self.tokens * a_token, f"{self.tokens:,} tokens x {a_token} bytes: a layer's route")

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward_attention(self) -> Line:
        elements = 2 * self.query + self.key_value + self.output + self.exchanged + self.latents + 2 * self.hidden
        return self._line(elements, "queries, keys, keys and values, output, latents, normed input, projection")

    def forward_dense(self) -> Line:
        elements = 3 * self.hidden + 3 * self.sizes.intermediate_size
        return self._line(elements, "gate, up, product, residual and normed input")

    def forward_experts(self) -> Line:
        rows = self.settings.load * self.sizes.num_experts_per_tok * self.hidden
        rows += self._shard_rows(self.hidden + 3 * self.inner) + 2 * self.received
        also = ", tokens received and sums to return" if self.settings.ep > 1 else ""
        why = f"all shards' rows out, residual and normed input, one shard's rows{also}"
        return self._line(3 * self.hidden + rows, why)

    def _shard_rows(self, width: float) -> float:
        """Elements per token: a shard's rows are tokens x top_k / shards, of those that are here."""
        s = self.sizes
        return self.settings.load * s.num_experts_per_tok * self.settings.ep / s.shards * width

    # -- left for the backward pass of a layer, by its forward pass or its recomputation ------------------------------

    def graph_attention(self) -> Line:
        elements = 2 * self.query + self.key_value + self.exchanged + self.latents + 2 * self.hidden
        return self._line(elements, "queries, keys, keys and values, latents, normed input, residual")

    def graph_mlp(self, dense: bool) -> Line:
        if dense:
            elements = self.hidden + 3 * self.sizes.intermediate_size
            return self._line(elements, "gate, up and their product, normed input")
        scores = 3 * self.sizes.n_routed_experts * 4 / self.settings.param_bytes
        width = 3 * self.inner * self.sizes.n_shared_experts
        why = "shared expert's gate, up and product, normed input, affinities"
        return self._line(self.hidden + width + scores, why)

    # -- backward -----------------------------------------------------------------------------------------------------

    def backward_attention(self) -> Line:
        elements = 2 * self.output + 2 * self.query + self.query * 4 / self.settings.param_bytes
        if self.settings.attention_kernel == "varlen":  # V and the output padded to the key's width, and run again
            elements += 4 * self.query - 2 * self.output
        return self._line(elements, "gradients of output, queries, keys, values, and an fp32 sum of the queries'")

    def backward_dense(self) -> Line:
        elements = 2 * self.hidden + 3 * self.sizes.intermediate_size
        return self._line(elements, "gradients of gate, up and product, of output and input")

    def backward_experts(self) -> Line:
        """There all the while: the output's gradient, and where ranks share the experts what they have received."""
        if self.settings.ep == 1:
            return self.layer_input()
        elements = self.hidden + 2 * self.received
        return self._line(elements, "the output's gradient, tokens and gradients received")

    def shard_activations(self) -> Line:
        """Before a shard's last three products: its rows and their gradient, gate_up and its gradient, both hidden."""
        return self._line(self._shard_rows(2 * self.hidden + 6 * self.inner), "one shard's rows and activations")

    def shard_backward(self) -> Line:
        """Beside the gradients of its weights: rows, their gradient and the result's, gate_up's gradient, hidden."""
        return self._line(self._shard_rows(3 * self.hidden + 3 * self.inner), "one shard's rows and their gradients")

    def shard_gradient(self) -> Line:
        """What a shard leaves until the layer's rows are summed."""
        return self._line(self._shard_rows(self.hidden), "a shard's gradient rows")

    # -- head ---------------------------------------------------------------------------------------------------------

    def head(self) -> dict[str, Line]:
        vocab, tokens, b = self.sizes.vocab_size, self.settings.targets, self.settings.param_bytes
        chunk = min(tokens, chunk_tokens(vocab))
        group = min(tokens, GRAD_CHUNKS * chunk)
        sizes = {
            "fp32 gradient of the head": (4 * self.sizes.embedding, f"{vocab:,} x {self.hidden:,} x 4 bytes"),
            "logits of a chunk": (4 * chunk * vocab, f"{chunk:,} tokens x {vocab:,} x 4 bytes"),
            "gradients of logits": (b * group * vocab, f"{group:,} tokens x {vocab:,} x {b} bytes"),
            "hidden states of the targets": (
                3 * tokens * self.hidden * b,
                f"{tokens:,} tokens x {self.hidden:,}, three times",
            ),
        }
        return {what: Line(LOSS, nbytes, why) for what, (nbytes, why) in sizes.items()}
