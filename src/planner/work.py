"""Seconds of one layer's and the head's work on one rank, from rates measured on an H100.

A micro-step has T tokens per rank; under SP a rank computes heads / SP over SP x T tokens, so T x heads stays.
"""

from src.models.deepseek_v3.sizes import attention_weights, mlp_weights
from src.planner import rates
from src.planner.cluster import Cluster
from src.planner.network import Exchange, neighbours
from src.planner.rates import interpolate
from src.planner.settings import Settings


class Work:
    """down, up, out: projections to the latents, to this rank's heads and from them, forward.

    elementwise: what passes through memory in a layer, forward and backward, and the launches.
    latents, outputs: an SP group's exchanges.
    """

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self.settings, self.cluster = settings, cluster
        s, sp, tokens = settings.sizes, settings.sp, settings.tokens
        weights = attention_weights(s)
        down = s.hidden_size * ((s.q_lora_rank or 0) + s.kv_lora_rank + s.qk_rope_head_dim)
        self.down = self.products(down)
        self.up = self.products(sum(weights.values()) - weights["o_proj"] - down)
        self.out = self.products(weights["o_proj"])
        self.elementwise = cluster.elementwise * (rates.ELEMENTWISE * tokens * s.hidden_size + rates.LAUNCH)
        # Projection, loss and both gradients, all in the forward pass.
        head = cluster.kernels * 6 * settings.targets * s.hidden_size * s.vocab_size
        self.head = head / (rates.HEAD * 1e12)
        output = s.num_attention_heads * s.v_head_dim
        self.latents = self._heads(tokens * s.latents * (sp - 1))
        self.outputs = self._heads(tokens * output * (sp - 1) / sp)

    def products(self, weights: float) -> float:
        """Multiplying every token of this rank with so many weights."""
        return self.cluster.kernels * 2 * weights * self.settings.tokens / (rates.PRODUCTS * 1e12)

    def attention(self, backward: bool) -> float:
        """Scores and values of this rank's heads over the whole row, causal; the backward counts twice the forward."""
        s, sizes, kernel = self.settings, self.settings.sizes, self.settings.attention_kernel
        n = min(s.document, s.max_length)
        width = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim + sizes.v_head_dim
        flops = s.row_tokens * n * (sizes.num_attention_heads / s.sp) * width
        table = (rates.ATTENTION_BACKWARD if backward else rates.ATTENTION_FORWARD)[kernel]
        slower = self.cluster.varlen if kernel == "varlen" else self.cluster.kernels
        return slower * flops * (2 if backward else 1) / (interpolate(table, n) * 1e12)

    def experts(self, backward: bool) -> float:
        """All of a layer's that are here, dispatch and combine included, on the busiest rank."""
        s = self.settings.sizes
        rows = self.settings.tokens * s.num_experts_per_tok
        table = rates.EXPERTS_BACKWARD if backward else rates.EXPERTS_FORWARD
        rate = interpolate(table, self.settings.ep * rows / s.n_routed_experts)
        flops = 2 * rows * self.settings.load * 3 * s.hidden_size * s.moe_intermediate_size
        return self.cluster.kernels * flops * (2 if backward else 1) / (rate * 1e12)

    def travel(self, rows: int) -> Exchange:
        """An EP group's exchange: so many rows of the hidden width for each token and rank that it reaches."""
        s = self.settings
        elements = rows * s.tokens * s.reach * s.load * s.sizes.hidden_size * (s.ep - 1) / s.ep
        return neighbours(s, self.cluster, s.ep, elements)

    def _heads(self, elements: float) -> Exchange:
        """With what each of a layer's six exchanges waits for the slowest rank of the group."""
        exchange = neighbours(self.settings, self.cluster, self.settings.sp, elements)
        if self.settings.sp == 1 or self.cluster.copies:
            return exchange
        mlp = self.products(sum(mlp_weights(self.settings.sizes, dense=False).values()))
        products = 3 * (self.down + self.up + self.out + mlp)
        layer = sum(self.attention(b) + self.experts(b) for b in (False, True)) + products + self.elementwise
        return exchange._replace(seconds=exchange.seconds + rates.SKEW * layer / 6)
