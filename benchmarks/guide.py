"""The public guide's way through a MoE block: a Python loop over experts, each picking its tokens by a mask.

Written from its description, for comparison. Its attention pads V to the key's width (kernel `varlen`), its loss keeps
all logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.deepseek_v3.experts import Experts


class LoopOverExperts(nn.Module):
    """The same weights as `experts`; x [T, H], weights [T, K], chosen [T, K] -> [T, H]. Its route is the choice."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.shards = experts

    def route(self, chosen: Tensor) -> Tensor:
        return chosen

    def set_out(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return chosen

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        index = 0
        for shard in self.shards.values():
            for gate_up, down in zip(shard.gate_up_proj, shard.down_proj, strict=True):
                mask = chosen == index  # [T, K]
                rows = mask.any(-1)
                gate, up = F.linear(x[rows], gate_up).chunk(2, -1)
                y = F.linear(F.silu(gate) * up, down) * (weights * mask).sum(-1)[rows, None]
                out[rows] += y.to(x.dtype)
                index += 1
        return out
