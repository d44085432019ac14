"""DeepSeek-V3 for packed rows, with Hugging Face's parameter names (the routed experts apart, which are stacked).

The model never mentions ranks or DeepSpeed: it is handed an SP group and a way to run a layer (`run_layer`), which
strategies/parallelize.py sets. It builds on the meta device and holds no float buffer but the routers' bias.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.

Legend: T tokens of the whole row, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config

from ..loss import linear_cross_entropy
from .attention import Attention, RMSNorm, RowGeometry
from .moe import MLP, MoE
from .rope import cos_sin, positions
from .sequence_parallel import SequenceParallelGroup, SingleProcess


class LossSums(NamedTuple):
    """Sums over the targets of this rank's tokens; who divides them by what is the trainer's business.

    loss: cross-entropy in nats, fp32 scalar, differentiable. correct: targets that have the largest logit, int64.
    """

    loss: Tensor
    correct: Tensor


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

    def forward(self, x: Tensor, row: RowGeometry) -> Tensor:
        """[T/SP, H] -> [T/SP, H]."""
        x = x + self.self_attn(self.input_layernorm(x), row)
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepseekV3Model(nn.Module):
    def __init__(self, config: DeepseekV3Config, experts_per_shard: int | None) -> None:
        super().__init__()
        # No padding_idx: DeepSeek's padding token also ends turns, and must be trained as such.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, experts_per_shard) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LMHead(nn.Module):
    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Any:
        """hidden [T, H] -> logits [T, V]; with labels [T], `linear_cross_entropy`'s sums instead."""
        if labels is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy(hidden, self.weight, labels)


def _call(layer: nn.Module, *args: Any) -> Any:
    return layer(*args)


class DeepseekV3ForCausalLM(nn.Module):
    """The whole model, over one packed row of T tokens, each rank of an SP group holding T/SP of them.

    Args:
        config: as `load_config` reads it.
        experts_per_shard: routed experts a ZeRO-3 shard; None chooses. It must divide the experts of a layer.
    """

    def __init__(self, config: DeepseekV3Config, experts_per_shard: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = DeepseekV3Model(config, experts_per_shard)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.sp: SequenceParallelGroup = SingleProcess()
        # How a layer is called; strategies/parallelize.py puts activation checkpointing here.
        self.run_layer: Callable[..., Any] = _call

    def set_attention_kernel(self, name: str) -> None:
        """By its name in `models.kernels`; resolved for device and dtype at the first forward."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernel = name

    def set_sequence_parallel(self, sp: SequenceParallelGroup) -> None:
        """The group over which the rows are split; its size must divide the attention heads."""
        self.sp = sp
        for module in self.modules():
            if isinstance(module, Attention):
                module.sp = sp

    def hidden_states(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """input_ids int64 [T/SP], cu_seqlens int32 [D+1] and max_seqlen of the whole row -> [T/SP, H], normed."""
        position_ids = positions(cu_seqlens, len(input_ids) * self.sp.size)
        row = RowGeometry(cu_seqlens, max_seqlen, *cos_sin(self.config, position_ids))
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = self.run_layer(layer, x, row)
        return self.model.norm(x)

    def logits(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """As `hidden_states` -> logits [T/SP, V]."""
        return self.lm_head(self.hidden_states(input_ids, cu_seqlens, max_seqlen))

    def forward(self, input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> LossSums:
        """As `hidden_states`, with labels int64 [T/SP], shifted already: labels[i] is to be predicted at i."""
        return LossSums(*self.lm_head(self.hidden_states(input_ids, cu_seqlens, max_seqlen), labels))
