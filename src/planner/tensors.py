"""Bytes of one layer's and the head's tensors on one rank.

They are those of src/models/deepseek_v3 (attention.py, moe.py, experts.py) and src/models/loss.py; lines say which.
"""

from src.models.deepseek_v3.sizes import attention_output_bytes, layer_input_bytes, most_received
from src.models.loss_chunks import GRAD_CHUNKS, chunk_tokens
from src.planner.ledger import LAYER, LOSS, Line
from src.planner.settings import Settings


class Tensors:
    """`Line.name` is the work of one layer; where a tensor is kept, the caller counts it elsewhere."""

    def __init__(self, settings: Settings) -> None:
        s, b, sp, tokens = settings.sizes, settings.param_bytes, settings.sp, settings.tokens

        def line(elements: float, why: str) -> Line:
            """Elements per token, of the weights' type."""
            a_token = elements * b
            return Line(LAYER, a_token * tokens, f"{tokens:,} tokens x {a_token / 1024:.1f} KiB: {why}")

        # Elements per token: of a residual, of queries (or keys), of keys and values together, of attention's output.
        hidden = s.hidden_size
        query = s.num_attention_heads * (s.qk_nope_head_dim + s.qk_rope_head_dim)
        key_value = s.num_attention_heads * (s.qk_nope_head_dim + s.v_head_dim)
        output = s.num_attention_heads * s.v_head_dim
        # Of latents, a rank's own and its SP group's; of attention's output once more, on its way through SP.
        latents, exchanged = s.latents * (1 + (sp if sp > 1 else 0)), output if sp > 1 else 0

        # Kept from the forward pass to the backward: attention's output with its log-sums (fp32, a head), and what the
        # output projection makes of it.
        kept = attention_output_bytes(s, b) / b
        self.layer_input = line(layer_input_bytes(s, b) / b, "a layer's input")
        self.kept_output = line(kept, "attention's output, its log-sums and the output projection")
        self.kept_kernel = line(kept - hidden, "attention's output and its log-sums")
        self.route = self._route(settings)
        # Besides, in the multi-token prediction's block; the main model's output is from before its norm.
        self.joined = line(4 * hidden, "two inputs side by side, the main model's output and its gradient")

        # Attention: forward, what the forward or its recomputation leaves for the backward, and the backward.
        projected = 2 * query + key_value
        self.forward_attention = line(
            projected + output + exchanged + latents + 2 * hidden,
            "queries, keys, keys and values, output, latents, normed input, projection",
        )
        self.graph_attention = line(
            projected + exchanged + latents + 2 * hidden,
            "queries, keys, keys and values, latents, normed input, residual",
        )
        gradients = 2 * output + 2 * query + query * 4 / b
        if settings.attention_kernel == "varlen":  # V and the output padded to the key's width, and run again
            gradients += 4 * query - 2 * output
        self.backward_attention = line(
            gradients, "gradients of output, queries, keys, values, and an fp32 sum of the queries'"
        )

        # As much of the dense MLP.
        wide = 3 * s.intermediate_size
        self.dense = (
            line(3 * hidden + wide, "gate, up, product, residual and normed input"),
            line(hidden + wide, "gate, up and their product, normed input"),
            line(2 * hidden + wide, "gradients of gate, up and product, of output and input"),
        )

        # And of experts. A shard's rows are tokens x top_k / shards, of those that are here.
        load, ep, inner = settings.load, settings.ep, s.moe_intermediate_size
        rows, shard = load * s.num_experts_per_tok, load * s.num_experts_per_tok * ep / s.shards
        # What a rank receives at once of the tokens of its EP group, whatever these have chosen.
        received = (most_received(s, ep) if ep > 1 else 0) * hidden
        also = ", tokens received and sums to return" if ep > 1 else ""
        self.experts = (
            line(
                3 * hidden + (rows * hidden + shard * (hidden + 3 * inner) + 2 * received),
                f"all shards' rows out, residual and normed input, one shard's rows{also}",
            ),
            line(
                hidden + 3 * inner * s.n_shared_experts + 3 * s.n_routed_experts * 4 / b,
                "shared expert's gate, up and product, normed input, affinities",
            ),
            line(hidden + 2 * received, "the output's gradient, tokens and gradients received")
            if ep > 1
            else self.layer_input,
        )
        # In the backward, before a shard's last three products: its rows and their gradient, gate_up and its gradient,
        # both hidden. Beside the gradients of its weights: rows, their gradient and the result's, gate_up's gradient,
        # hidden. What a shard leaves until the layer's rows are summed.
        self.shard_activations = line(shard * (2 * hidden + 6 * inner), "one shard's rows and activations")
        self.shard_backward = line(shard * (3 * hidden + 3 * inner), "one shard's rows and their gradients")
        self.shard_gradient = line(shard * hidden, "a shard's gradient rows")

        self.head = self._head(settings)

    def _route(self, settings: Settings) -> Line:
        """Chosen experts, order, tokens, slots and shards of each row, int32, kept over the recomputation."""
        s, top_k = settings, settings.sizes.num_experts_per_tok
        a_token = 5 * 4 * top_k
        if s.ep > 1:  # as src/models/deepseek_v3/expert_parallel.py: of what is received, and of what is sent
            received = 12 * top_k * s.reach + 8 * top_k * s.load
            a_token = round(received + 4 * s.reach + 8 * s.ep + 8 * top_k)
        return Line(LAYER, s.tokens * a_token, f"{s.tokens:,} tokens x {a_token} bytes: a layer's route")

    def _head(self, settings: Settings) -> dict[str, Line]:
        s, tokens, b = settings.sizes, settings.targets, settings.param_bytes
        vocab, hidden = s.vocab_size, s.hidden_size
        chunk = min(tokens, chunk_tokens(vocab))
        group = min(tokens, GRAD_CHUNKS * chunk)
        states = 3 * tokens * hidden * b
        return {
            "fp32 gradient of the head": Line(LOSS, 4 * s.embedding, f"{vocab:,} x {hidden:,} x 4 bytes"),
            "logits of a chunk": Line(LOSS, 4 * chunk * vocab, f"{chunk:,} tokens x {vocab:,} x 4 bytes"),
            "gradients of logits": Line(LOSS, b * group * vocab, f"{group:,} tokens x {vocab:,} x {b} bytes"),
            "hidden states of the targets": Line(LOSS, states, f"{tokens:,} tokens x {hidden:,}, three times"),
        }
