"""Tokens travel to shared experts while the layer computes its shared expert, in the forward pass and the backward."""

import contextlib
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.models.deepseek_v3 import config_from_dict
from src.models.deepseek_v3.experts import ExpertShard
from src.models.deepseek_v3.moe import MoE
from src.models.deepseek_v3.recompute import Kept, recompute
from src.models.deepseek_v3.row import RowGeometry

from .tiny import DEEPSEEK_V3

HIDDEN = DEEPSEEK_V3["hidden_size"]
FORWARD = ["gate_proj", "tokens leave", "up_proj", "down_proj", "tokens come", "experts", "sums leave", "sums come"]
BACKWARD = [
    *["both leave", "down_proj backward", "up_proj backward", "gate_proj backward", "both come"],
    *["experts backward", "gradients leave", "gradients come"],
]


class Alone:
    """A group of one rank that notes when rows of the hidden width leave and when they are waited for."""

    rank, size = 0, 1

    def __init__(self, log: list[str]) -> None:
        self._log, self._names = log, iter(["tokens", "sums", "both", "gradients"])

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> "_Coming":
        name = next(self._names) if rows.shape[-1] == HIDDEN else None
        return _Coming(rows.clone(), self._log, name)


class _Coming:
    def __init__(self, rows: Tensor, log: list[str], name: str | None) -> None:
        self._rows, self._log, self._name = rows, log, name
        if name is not None:
            log.append(f"{name} leave")

    def wait(self) -> Tensor:
        if self._name is not None:
            self._log.append(f"{self._name} come")
        return self._rows


@pytest.mark.parametrize("again", [False, True])
def test_the_shared_expert_runs_while_tokens_travel(again: bool) -> None:
    torch.manual_seed(0)
    log = list[str]()
    layer = MoE(config_from_dict(DEEPSEEK_V3), experts_per_shard=8)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    alone = MoE(config_from_dict(DEEPSEEK_V3), experts_per_shard=8)
    alone.load_state_dict(layer.state_dict())
    layer.experts.share(Alone(log), 1.0)
    layer.kept = Kept(None) if again else None
    shard = layer.experts["0"]
    assert isinstance(shard, ExpertShard)
    shard.register_forward_hook(lambda *_: log.append("experts"))
    shard.down_proj.register_hook(lambda _: log.append("experts backward"))
    for name, projection in layer.shared_experts.named_children():
        projection.register_forward_hook(lambda *_, name=name: log.append(name))
        assert isinstance(projection, nn.Linear)
        projection.weight.register_hook(lambda _, name=name: log.append(f"{name} backward"))

    x = torch.randn(10, HIDDEN)
    none = torch.empty(0)
    row = RowGeometry(none, 10, none, none, torch.ones(1, 10), torch.full((1,), 10.0))
    outputs = []
    for moe in (alone, layer):
        start = x.clone().requires_grad_()
        run = partial(checkpoint, moe, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), recompute()))
        out, _ = run(start * 1, row) if again and moe is layer else moe(start * 1, row)
        if moe is layer:
            assert log == FORWARD
            log.clear()
        out.square().sum().backward()
        outputs.append((out.detach(), start.grad, moe.gate.weight.grad, moe.shared_experts.up_proj.weight.grad))
    recomputed = ["gate_proj", "up_proj"] if again else []
    assert log == [*recomputed, *BACKWARD]
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
