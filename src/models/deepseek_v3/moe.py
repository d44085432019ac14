"""DeepSeekMoE: a sigmoid router with group-limited choice, shared experts, routed experts.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; the balance loss is its equations 17 to 20.

Legend: T tokens, H hidden, E experts, G groups (n_group), K experts a token, D documents of a row.
"""

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config

from ..kernels import gated_unit, matmul_fp32
from .expert_parallel import Journey
from .experts import Experts
from .linear import LastLinear, linear
from .recompute import Kept, recomputing, unhooked
from .route import Route
from .row import RowGeometry
from .sizes import shard_size
from .sp_group import SequenceParallelGroup, SingleProcess


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): [T, H] -> [T, H], the last part of a layer."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = LastLinear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, self.gate_proj(x))

    def finish(self, x: Tensor, gate: Tensor) -> Tensor:
        """What comes after the first projection."""
        out: Tensor = unhooked(self.down_proj)(gated_unit(gate, self.up_proj(x)))
        return out


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

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> affinities fp32 [T, E]."""
        # Summed in fp32 whatever the operands' dtype, so that rounding decides no close call.
        return linear(x, self, lambda: matmul_fp32(x, self.weight.T)).sigmoid()

    def weigh(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """Affinities fp32 [T, E], chosen experts [T, K] -> their weights fp32 [T, K]."""
        weights = scores.gather(1, chosen.long())
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scaling

    def choose(self, scores: Tensor) -> Tensor:
        """Affinities fp32 [T, E] -> each token's experts, int64 [T, K]."""
        candidates = scores + self.e_score_correction_bias
        if self.top_groups < self.groups:
            grouped = candidates.unflatten(1, (self.groups, -1))  # [T, G, E/G]
            worth = grouped.topk(2, -1, sorted=False).values.sum(-1)  # a group counts its best two
            best = worth.topk(self.top_groups, -1).indices
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
        """experts_per_shard: None chooses it (`shard_size`).

        Raises:
            ValueError: the layer's experts are not a multiple of experts_per_shard.
        """
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.shared_experts = MLP(hidden, width * config.n_shared_experts)
        self.experts = Experts(experts, shard_size(experts, hidden, width, experts_per_shard), hidden, width)
        # Set by DeepseekV3ForCausalLM for all layers at once.
        self.sp: SequenceParallelGroup = SingleProcess()
        self.with_balance = False
        self.kept: Kept | None = None  # None: routed again in a recomputation

    def forward(self, x: Tensor, row: RowGeometry) -> tuple[Tensor, Tensor]:
        """[T/SP, H] -> [T/SP, H], and `sequence_balance`, zero where `with_balance` is off, and in evaluation."""
        scores = self.gate(x)
        kept = self.kept if torch.is_grad_enabled() else None
        if kept is None:
            chosen, way = self._route(scores)
        else:
            kept.begin()
            chosen, way = kept.once(lambda: self._route(scores))
        if self.training and not recomputing():
            real = row.documents.sum(0).long()  # [T/SP], one but for padding
            self.gate.load.scatter_add_(0, chosen.flatten().long(), real.repeat_interleave(chosen.shape[1]))
        balance = scores.new_zeros(())
        if self.with_balance and self.training:
            balance = sequence_balance(scores, row, chosen.shape[1], self.sp)
        weights = self.gate.weigh(scores, chosen)
        # The host waits until it knows how many tokens are to travel while the device computes the first projection.
        gate = self.shared_experts.gate_proj(x)
        on_the_way = self.experts.set_out(x, weights, way)
        shared = self.shared_experts.finish(x, gate)
        return self.experts(x, weights, on_the_way) + shared, balance

    def _route(self, scores: Tensor) -> tuple[Tensor, Route | Journey]:
        chosen = self.gate.choose(scores.detach())
        return chosen.int(), self.experts.route(chosen)
