"""DeepSeekMoE: a sigmoid router with group-limited choice, shared experts, routed experts.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; the balance loss is its equations 17 to 20.

Legend: T tokens, H hidden, E experts, G groups (n_group), K experts a token, D documents of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config

from .attention import RowGeometry
from .experts import Experts, auto_experts_per_shard
from .recompute import recomputing
from .sequence_parallel import SequenceParallelGroup, SingleProcess


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): [T, H] -> [T, H]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Affinities s = sigmoid(x W^T); the bias takes part in the choice of experts, never in their weights."""

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        # A buffer, fp32 whatever the model's dtype: it moves in steps of 0.001 and decides close calls.
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        # Tokens that chose each expert since it was last zeroed, of this rank, padding apart. Not in checkpoints.
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.groups, self.top_groups = config.n_group, config.topk_group
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> affinities fp32 [T, E], chosen experts [T, K], their weights fp32 [T, K]."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        chosen = self._choose(scores.detach())
        weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return scores, chosen, weights * self.scaling

    def _choose(self, scores: Tensor) -> Tensor:
        candidates = scores + self.e_score_correction_bias
        if self.top_groups < self.groups:
            grouped = candidates.unflatten(1, (self.groups, -1))  # [T, G, E/G]
            best = grouped.topk(2, -1).values.sum(-1).topk(self.top_groups, -1).indices  # a group counts its best two
            out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)  # [T, G]
            # -inf, as in DeepSeek's inference code; with 0, experts of lost groups would win over negative biases.
            candidates = grouped.masked_fill(out[..., None], float("-inf")).flatten(1)
        return candidates.topk(self.top_k, -1, sorted=False).indices


def sequence_balance(scores: Tensor, row: RowGeometry, top_k: int, sp: SequenceParallelGroup) -> Tensor:
    """The sequence-wise balance loss of each document times its tokens, summed; this rank's part of that sum.

    For a document of T tokens, f_i = E / (K T) x (tokens with expert i among the K largest affinities, no bias and no
    groups), P_i = mean of s_i / sum(s), and its loss is sum_i f_i P_i, 1 where the load is even. The document counts
    whole, also where SP splits it; the group's ranks return equal parts.

    scores: affinities fp32 [T/SP, E]. Returns an fp32 scalar.
    """
    share = scores / scores.sum(-1, keepdim=True)
    picked = torch.zeros_like(share).scatter_(1, scores.detach().topk(top_k, -1).indices, 1.0)
    sums = sp.all_reduce(torch.stack([row.documents @ picked, row.documents @ share]))  # [2, D, E]
    frequency = sums[0] * (scores.shape[1] / top_k) / row.lengths.clamp(min=1)[:, None]
    return (frequency.detach() * sums[1]).sum() / sp.size


class MoE(nn.Module):
    def __init__(self, config: DeepseekV3Config, experts_per_shard: int | None = None) -> None:
        """experts_per_shard: None chooses it (`auto_experts_per_shard`).

        Raises:
            ValueError: the layer's experts are not a multiple of experts_per_shard.
        """
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        size = auto_experts_per_shard(experts) if experts_per_shard is None else experts_per_shard
        if size < 1 or experts % size:
            raise ValueError(
                f"experts_per_shard {size} does not divide the {experts} experts of a layer (n_routed_experts); "
                f"'auto' takes {auto_experts_per_shard(experts)}."
            )
        self.gate = Router(config)
        self.shared_experts = MLP(hidden, width * config.n_shared_experts)
        self.experts = Experts(experts, size, hidden, width)
        # Set by DeepseekV3ForCausalLM for all layers at once.
        self.sp: SequenceParallelGroup = SingleProcess()
        self.with_balance = False

    def forward(self, x: Tensor, row: RowGeometry) -> tuple[Tensor, Tensor]:
        """[T/SP, H] -> [T/SP, H], and `sequence_balance`, zero where `with_balance` is off, and in evaluation."""
        scores, chosen, weights = self.gate(x)
        if self.training and not recomputing():
            real = row.documents.sum(0).long()  # [T/SP], one but for padding
            self.gate.load.scatter_add_(0, chosen.flatten(), real.repeat_interleave(chosen.shape[1]))
        balance = scores.new_zeros(())
        if self.with_balance and self.training:
            balance = sequence_balance(scores, row, chosen.shape[1], self.sp)
        return self.experts(x, chosen, weights) + self.shared_experts(x), balance
