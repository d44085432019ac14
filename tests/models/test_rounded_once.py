"""What is bf16 outside is summed in fp32 inside and rounded once, and no close call of the router is made twice."""

import contextlib
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from src.models.deepseek_v3 import config_from_dict
from src.models.deepseek_v3.experts import Experts
from src.models.deepseek_v3.moe import MoE, Router
from src.models.deepseek_v3.recompute import Kept, recompute
from src.models.deepseek_v3.row import RowGeometry
from src.models.kernels import sum_rows

from .tiny import DEEPSEEK_V3

BF16 = torch.bfloat16


def test_affinities_are_those_of_unrounded_logits() -> None:
    torch.manual_seed(0)
    router = Router(config_from_dict(DEEPSEEK_V3)).to(BF16)
    router.weight.data.normal_()
    x = torch.randn(64, DEEPSEEK_V3["hidden_size"]).to(BF16)
    exact = (x.double() @ router.weight.double().T).sigmoid()
    torch.testing.assert_close(router(x).double(), exact, rtol=1e-5, atol=1e-7)  # rounded logits are 4e-3 off


def test_rows_of_experts_are_summed_in_fp32() -> None:
    torch.manual_seed(0)
    tokens, top_k, width, sizes = 50, 8, 16, [130, 0, 270]
    rows = [torch.randn(size, width).to(BF16) for size in sizes]
    slots = torch.randperm(tokens * top_k).view(tokens, top_k)
    parts = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))[slots]
    exact = torch.cat(rows).double()[slots].sum(1)
    torch.testing.assert_close(sum_rows(rows, slots, parts).double(), exact, rtol=2**-8, atol=1e-6)  # half an ulp


def test_the_recomputation_takes_the_route_that_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In it a bias that moved meanwhile, or a product that rounds otherwise, would choose other experts."""
    torch.manual_seed(0)
    moe = MoE(config_from_dict(DEEPSEEK_V3), 2)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    moe.kept = Kept(None)
    routed: list[Any] = []
    route = Experts.route

    def count(experts: Experts, chosen: torch.Tensor) -> Any:
        routed.append(chosen)
        return route(experts, chosen)

    monkeypatch.setattr(Experts, "route", count)
    x = torch.randn(12, DEEPSEEK_V3["hidden_size"]).requires_grad_()
    none, one = torch.empty(0), torch.ones(1, 12)
    row = RowGeometry(none, 12, none, none, one, torch.tensor([12.0]))

    def gradients(disturb: bool) -> list[torch.Tensor]:
        moe.gate.e_score_correction_bias.zero_()
        both = lambda: (contextlib.nullcontext(), recompute())  # noqa: E731
        out, _ = checkpoint(moe, x, row, use_reentrant=False, context_fn=both)
        if disturb:
            moe.gate.e_score_correction_bias.copy_(torch.linspace(-9, 9, DEEPSEEK_V3["n_routed_experts"]))
        return list(torch.autograd.grad(out.square().sum(), [x, *moe.parameters()]))

    before, after = gradients(False), gradients(True)
    assert len(routed) == 2  # once a forward pass
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
