"""The decoder layer, and the one more of them that predicts the token after the next.

Source: DeepSeek-V3, arXiv 2412.19437, sections 2.1 and 2.2.

Legend: T tokens of the whole row, H hidden.
"""

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config

from .attention import Attention
from .moe import MLP, MoE
from .norm import RMSNorm
from .row import RowGeometry


class DecoderLayer(nn.Module):
    def __init__(self, config: DeepseekV3Config, index: int, experts_per_shard: int | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            MLP(config.hidden_size, config.intermediate_size)
            if index < config.first_k_dense_replace
            else MoE(config, experts_per_shard)
        )

    def forward(self, x: Tensor, row: RowGeometry) -> tuple[Tensor, Tensor]:
        """[T/SP, H] -> [T/SP, H], and the layer's balance sum, an fp32 scalar."""
        x = x + self.self_attn(self.input_layernorm(x), row)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, balance = self.mlp(normed, row)
            return x + y, balance
        return x + self.mlp(normed), x.new_zeros((), dtype=torch.float32)


class SharedHeadNorm(nn.Module):
    """Only for its published name, shared_head.norm; the head itself is the main model's."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class MTPLayer(DecoderLayer):
    """Multi-token prediction of depth one: from position i and token i+1 to token i+2.

    Source: DeepSeek-V3, section 2.2. The published weights want the embedding first in the concatenation, although
    equation 21 writes the hidden state first.
    """

    def __init__(self, config: DeepseekV3Config, index: int, experts_per_shard: int | None) -> None:
        super().__init__(config, index, experts_per_shard)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_head = SharedHeadNorm(config)

    def forward(self, x: Tensor, embedded: Tensor, row: RowGeometry) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x [T/SP, H], the main model's output after its norm; embedded [T/SP, H], each token's next one's embedding.

        Returns the block's output [T/SP, H] and its balance sum. `shared_head` comes after, outside the layer that is
        recomputed: in a recompute the experts' output, and so the block's, is not there.
        """
        return super().forward(self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(x)], -1)), row)
