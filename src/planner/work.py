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
    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self.settings, self.cluster, self.sizes = settings, cluster, settings.sizes
        self.tokens = settings.tokens

    def products(self, weights: float) -> float:
        """Multiplying every token of this rank with so many weights."""
        return self.cluster.kernels * 2 * weights * self.tokens / (rates.PRODUCTS * 1e12)

    def attention(self, backward: bool) -> float:
        """Scores and values of this rank's heads over the whole row, causal; the backward counts twice the forward."""
        s, sizes, kernel = self.settings, self.sizes, self.settings.attention_kernel
        n = min(s.document, s.max_length)
        width = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim + sizes.v_head_dim
        flops = s.row_tokens * n * (sizes.num_attention_heads / s.sp) * width
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

    def elementwise(self) -> float:
        """What passes through memory in a layer, forward and backward, and the launches."""
        through_memory = rates.ELEMENTWISE * self.tokens * self.sizes.hidden_size
        return self.cluster.elementwise * (through_memory + rates.LAUNCH)

    def experts(self, backward: bool) -> float:
        """All of a layer's that are here, dispatch and combine included, on the busiest rank."""
        s = self.sizes
        rows = self.tokens * s.num_experts_per_tok
        table = rates.EXPERTS_BACKWARD if backward else rates.EXPERTS_FORWARD
        rate = interpolate(table, self.settings.ep * rows / s.n_routed_experts)
        flops = 2 * rows * self.settings.load * 3 * s.hidden_size * s.moe_intermediate_size
        return self.cluster.kernels * flops * (2 if backward else 1) / (rate * 1e12)

    def head(self) -> float:
        """Projection, loss and both gradients, all in the forward pass."""
        s, targets = self.sizes, self.settings.targets
        return self.cluster.kernels * 6 * targets * s.hidden_size * s.vocab_size / (rates.HEAD * 1e12)

    def travel(self, rows: int) -> Exchange:
        """An EP group's exchange: so many rows of the hidden width for each token and rank that it reaches."""
        s = self.settings
        elements = rows * self.tokens * s.reach * s.load * self.sizes.hidden_size * (s.ep - 1) / s.ep
        return neighbours(s, self.cluster, s.ep, elements)

    def latents(self) -> Exchange:
        """An SP group's exchange of latents."""
        return self._heads(self.tokens * self.sizes.latents * (self.settings.sp - 1))

    def outputs(self) -> Exchange:
        """An SP group's exchange of attention's outputs."""
        sp, width = self.settings.sp, self.sizes.num_attention_heads * self.sizes.v_head_dim
        return self._heads(self.tokens * width * (sp - 1) / sp)

    def _heads(self, elements: float) -> Exchange:
        """With what each of a layer's six exchanges waits for the slowest rank of the group."""
        exchange = neighbours(self.settings, self.cluster, self.settings.sp, elements)
        if self.settings.sp == 1 or self.cluster.copies:
            return exchange
        mlp = self.products(sum(mlp_weights(self.sizes, dense=False).values()))
        products = 3 * (self.down() + self.up() + self.out() + mlp)
        layer = sum(self.attention(b) + self.experts(b) for b in (False, True)) + products + self.elementwise()
        return exchange._replace(seconds=exchange.seconds + rates.SKEW * layer / 6)
