"""DeepSeek-V3 for packed rows, with Hugging Face's parameter names (the routed experts apart, which are stacked).

The model never mentions ranks or DeepSpeed: it is handed an SP group and a way to run a layer (`run_layer`), which
strategies/parallelize.py sets. It builds on the meta device and holds no float buffer but the routers' bias.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.

Legend: T tokens of the whole row, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import DeepseekV3Config

from ..loss import linear_cross_entropy
from ..offload import HostStack
from .attention import Attention
from .expert_parallel import ExpertParallelGroup
from .experts import Experts, ExpertShard
from .flops import packed_flops
from .layers import DecoderLayer, MTPLayer
from .moe import MoE, Router
from .norm import RMSNorm
from .recompute import Kept
from .rope import cos_sin, positions
from .row import RowGeometry
from .sizes import attention_output_bytes, layer_input_bytes, most_received
from .sp_group import SequenceParallelGroup, SingleProcess


class LossWeights(NamedTuple):
    """What each sum counts in the loss; the trainer puts its divisors here.

    cross_entropy: for a target token. mtp: for a target of the multi-token prediction. balance: for a token of
    `sequence_balance`'s sum over the MoE layers.
    """

    cross_entropy: float = 1.0
    mtp: float = 0.0
    balance: float = 0.0


PLAIN = LossWeights()


class Losses(NamedTuple):
    """Of this rank's tokens. Sums over the ranks are those of the whole row, whatever SP is.

    loss: the weighted sum, fp32 scalar, the only one with a gradient.
    cross_entropy, mtp: sums in nats over the targets.
    balance: `sequence_balance` over the MoE layers, this rank's part.
    correct: targets that have the largest logit.
    token_losses: fp32 [T/SP], each target's cross-entropy, zero elsewhere.
    """

    loss: Tensor
    cross_entropy: Tensor
    mtp: Tensor
    balance: Tensor
    correct: Tensor
    token_losses: Tensor


class DeepseekV3Model(nn.Module):
    def __init__(self, config: DeepseekV3Config, experts_per_shard: int | None, with_mtp: bool) -> None:
        super().__init__()
        # No padding_idx: DeepSeek's padding token also ends turns, and must be trained as such.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, experts_per_shard) for index in range(config.num_hidden_layers)
        )
        if with_mtp:  # under its published name, model.layers.{num_hidden_layers}
            self.layers.append(MTPLayer(config, config.num_hidden_layers, experts_per_shard))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LMHead(nn.Module):
    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, hidden: Tensor, labels: Tensor | None = None, sections: Sequence[tuple[int, float]] = ()) -> Any:
        """hidden [T, H] -> logits [T, V]; with labels [T] and sections, what `linear_cross_entropy` returns instead."""
        if labels is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy(hidden, self.weight, labels, sections)


def _call(layer: nn.Module, *args: Any) -> Any:
    return layer(*args)


class DeepseekV3ForCausalLM(nn.Module):
    """The whole model, over one packed row of T tokens, each rank of an SP group holding T/SP of them.

    Args:
        config: as `load_config` reads it.
        experts_per_shard: routed experts a ZeRO-3 shard; None chooses. It must divide the experts of a layer.
        with_mtp: build the multi-token-prediction block.
    """

    # DeepSpeed honours transformers' name for it (runtime/keep_in_fp32.py), also under its zero.Init.
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)

    def __init__(self, config: DeepseekV3Config, experts_per_shard: int | None = None, with_mtp: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = DeepseekV3Model(config, experts_per_shard, with_mtp)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.sp: SequenceParallelGroup = SingleProcess()
        # How a layer is called; strategies/parallelize.py puts activation checkpointing here.
        self.run_layer: Callable[..., Any] = _call
        self.host = HostStack()
        self.offload_layer_inputs = False

    @property
    def experts_per_shard(self) -> int:
        """1 where no layer has experts."""
        shards = (m for m in self.modules() if isinstance(m, ExpertShard))
        return next((len(shard.down_proj) for shard in shards), 1)

    def set_attention_kernel(self, name: str) -> None:
        """By its name in `models.kernels`; resolved for device and dtype at the first forward."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernel = name

    def set_kept(self, attention_output: str, layer_input: str) -> None:
        """What stays from a layer's forward pass until its recomputation; for use with activation checkpointing.

        attention_output: `keep`, `offload` (in pinned host memory) or `recompute`; that of the kernel, its log-sums and
            the output projection's.
        layer_input: `keep` or `offload`.
        """
        host = self.host if attention_output == "offload" else None
        for module in self.modules():
            if isinstance(module, Attention):
                module.kept = None if attention_output == "recompute" else Kept(host)
            elif isinstance(module, MoE):
                module.kept = Kept(None)  # the routing: small, and the experts' rows must be the same again
        self.offload_layer_inputs = layer_input == "offload"
        self.host.ahead = 3 * (attention_output == "offload") + self.offload_layer_inputs

    @property
    def kept_bytes(self) -> dict[str, int]:
        """Bytes per token and layer of what `set_kept` decides about, by its argument's name."""
        size = self.lm_head.weight.element_size()
        return {
            "attention_output": attention_output_bytes(self.config, size),
            "layer_input": layer_input_bytes(self.config, size),
        }

    def set_sequence_parallel(self, sp: SequenceParallelGroup) -> None:
        """The group over which the rows are split; its size must divide the attention heads."""
        self.sp = sp
        for module in self.modules():
            if isinstance(module, Attention | MoE):
                module.sp = sp

    def set_expert_parallel(self, group: ExpertParallelGroup) -> None:
        """The group that shares each layer's experts, before these have memory; its size must divide the shards."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.share(group, most_received(self.config, group.size))

    def set_balance(self, on: bool) -> None:
        """Whether the MoE layers compute the balance loss."""
        for module in self.modules():
            if isinstance(module, MoE):
                module.with_balance = on

    @property
    def routers(self) -> list[Router]:
        """The MoE layers' routers in layer order, the multi-token prediction's last."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def _geometry(self, tokens: int, cu_seqlens: Tensor, max_seqlen: int, document_ids: Tensor | None) -> RowGeometry:
        position_ids = positions(cu_seqlens, tokens * self.sp.size)
        if document_ids is None:  # no padding: every token belongs to the document that its place tells
            place = torch.arange(tokens, device=cu_seqlens.device) + self.sp.rank * tokens
            document_ids = torch.searchsorted(cu_seqlens.long(), place, right=True) - 1
        numbers = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
        documents = (numbers[:, None] == document_ids).float()
        lengths = cu_seqlens.diff().float()
        return RowGeometry(cu_seqlens, max_seqlen, *cos_sin(self.config, position_ids), documents, lengths)

    def _layer(self, layer: nn.Module, *args: Any) -> Any:
        inputs = [arg for arg in args if isinstance(arg, Tensor)]
        if not any(tensor.requires_grad for tensor in (*inputs, *layer.parameters())):
            with torch.no_grad():  # no backward pass comes, which would fetch what the layer keeps for it
                return layer(*args)
        if not (self.offload_layer_inputs and torch.is_grad_enabled()):
            return self.run_layer(layer, *args)
        # Activation checkpointing saves the layer's arguments, and them alone, under the hooks of its caller.
        with saved_tensors_hooks(self._put, self.host.take):
            return self.run_layer(layer, *args)

    def _put(self, tensor: Tensor) -> Any:
        return self.host.put(tensor) if tensor.numel() else tensor

    def _main(self, x: Tensor, row: RowGeometry) -> tuple[Tensor, Tensor]:
        """Embedded tokens [T/SP, H] -> the normed output of the main model's layers, and their balance sums."""
        balance = x.new_zeros((), dtype=torch.float32)
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            x, layer_balance = self._layer(layer, x, row)
            balance = balance + layer_balance
        return self.model.norm(x), balance

    def step_flops(self, tokens: int, squares: int, targets: int, mtp_targets: int) -> int:
        """Useful operations of a step's forward and backward, over all ranks, for MFU.

        Args:
            tokens, squares: the sums of its documents' lengths and of their squares.
            targets, mtp_targets: the tokens that go through the head; the latter where the block is built.
        """
        mtp = len(self.model.layers) > self.config.num_hidden_layers
        return packed_flops(self.config, tokens, squares, targets + mtp * mtp_targets, mtp)

    def logits(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """input_ids int64 [T/SP], cu_seqlens int32 [D+1] and max_seqlen of the whole row -> logits [T/SP, V]."""
        row = self._geometry(len(input_ids), cu_seqlens, max_seqlen, None)
        return self.lm_head(self._main(self.model.embed_tokens(input_ids), row)[0])

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        document_ids: Tensor | None = None,
        mtp_input_ids: Tensor | None = None,
        mtp_labels: Tensor | None = None,
        weights: LossWeights = PLAIN,
    ) -> Losses:
        """The losses of one packed row.

        Args:
            input_ids: int64 [T/SP], this rank's tokens.
            labels: int64 [T/SP], shifted already: labels[i] is to be predicted at i; `IGNORE_INDEX` is no target.
            cu_seqlens, max_seqlen: int32 [D+1] and the longest document, of the whole row.
            document_ids: int64 [T/SP], the number of each token's document, -1 for padding; None: no padding.
            mtp_input_ids, mtp_labels: int64 [T/SP], each token's next one and the label after; used where the
                multi-token prediction is built and weighs something.
            weights: what each sum counts in `loss`.
        """
        tokens = len(input_ids)
        if torch.is_grad_enabled():
            self.host.begin(tokens)
        row = self._geometry(tokens, cu_seqlens, max_seqlen, document_ids)
        mtp = len(self.model.layers) > self.config.num_hidden_layers and weights.mtp != 0
        if not mtp:
            hidden, balance = self._main(self.model.embed_tokens(input_ids), row)
        else:
            assert mtp_input_ids is not None and mtp_labels is not None
            # One call of the embedding, and below of the head: ZeRO-3 gathers each once.
            x, ahead = self.model.embed_tokens(torch.cat([input_ids, mtp_input_ids])).split(tokens)
            hidden, balance = self._main(x, row)
            block = self.model.layers[-1]
            assert isinstance(block, MTPLayer)
            predicted, layer_balance = self._layer(block, hidden, ahead, row)
            hidden, balance = torch.cat([hidden, block.shared_head(predicted)]), balance + layer_balance
            labels = torch.cat([labels, mtp_labels])
        sections = [(tokens, weights.cross_entropy), (len(labels) - tokens, weights.mtp)]
        loss, token_losses, correct = self.lm_head(hidden, labels, sections)
        return Losses(
            loss + weights.balance * balance,
            token_losses[:tokens].sum(),
            token_losses[tokens:].sum(),
            balance.detach(),
            correct[:tokens].sum(),
            token_losses[:tokens],
        )
