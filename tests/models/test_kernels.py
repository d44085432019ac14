"""The kernel facade: what it picks, what it refuses, and its plain paths against autograd and loops."""

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from src.models import kernels
from src.models.kernels.attention import FlashAttention4
from src.models.loss import IGNORE_INDEX, linear_cross_entropy

CPU = torch.device("cpu")


def test_auto_takes_what_runs_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    kernels.resolve_attention.cache_clear()
    with caplog.at_level("INFO"):
        assert kernels.resolve_attention("auto", CPU, torch.float32) is kernels.ATTENTION["sdpa"]
    assert caplog.messages == ["attention kernel: sdpa"]  # what the others need is no news on a CPU


def test_a_kernel_that_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'flash_attn_4' cannot run: it needs CUDA, the device is cpu"):
        kernels.resolve_attention("flash_attn_4", CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="'flash' is unknown; it is one of auto, flash_attn_4, varlen, sdpa"):
        kernels.resolve_attention("flash", CPU, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_is_a_loop_over_experts(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = (
        torch.randn(10, 16, generator=generator).to(dtype),
        torch.randn(4, 16, 8, generator=generator).to(dtype),
    )
    offsets = torch.tensor([3, 3, 9, 10], dtype=torch.int32)  # the second expert has no rows
    bounds = [0, *offsets.tolist()]
    expected = torch.cat([x[bounds[j] : bounds[j + 1]] @ weights[j] for j in range(4)])
    torch.testing.assert_close(kernels.grouped_mm(x, weights, offsets), expected)
    y = torch.randn(10, 8, generator=generator).to(dtype)
    by_expert = torch.stack([x[bounds[j] : bounds[j + 1]].T @ y[bounds[j] : bounds[j + 1]] for j in range(4)])
    torch.testing.assert_close(kernels.grouped_mm(x.T, y, offsets), by_expert)


def test_swiglu_backward_is_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(7, 12, generator=generator).requires_grad_()
    weight = torch.rand(7, generator=generator).requires_grad_()
    grad = torch.randn(7, 6, generator=generator)
    out = kernels.swiglu(gate_up[:, :6], gate_up[:, 6:], weight)
    out.backward(grad)
    found = kernels.swiglu_backward(gate_up.detach()[:, :6], gate_up.detach()[:, 6:], grad, weight.detach())
    for ours, expected in zip(found, (gate_up.grad, out.detach(), weight.grad), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_linear_cross_entropy_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.models.loss_chunks.CHUNK_ELEMENTS", 11 * chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([3, IGNORE_INDEX, 10, 0, IGNORE_INDEX, 5, 5, 1, IGNORE_INDEX])
    logits = hidden @ weight.T
    sections = [(4, 0.3), (5, 1.7)]
    scale = torch.tensor([0.3] * 4 + [1.7] * 5)
    each = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    expected = (each * scale).sum()
    wanted = torch.autograd.grad(expected * 0.3, [hidden, weight])
    loss, losses, correct = linear_cross_entropy(hidden, weight, labels, sections)
    found = torch.autograd.grad(loss * 0.3, [hidden, weight])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(losses.double(), each.detach(), rtol=1e-6, atol=0)
    assert torch.equal(correct, logits.argmax(-1) == labels)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_row_without_targets_has_a_loss_of_zero_and_gradients() -> None:
    hidden, weight = torch.randn(4, 5).requires_grad_(), torch.randn(11, 5).requires_grad_()
    loss, losses, correct = linear_cross_entropy(hidden, weight, torch.full((4,), IGNORE_INDEX), [(4, 1.0)])
    loss.backward()
    assert loss == 0 and not losses.any() and not correct.any()
    assert hidden.grad is not None and weight.grad is not None  # a rank without targets still reduces its share
    assert not hidden.grad.any() and not weight.grad.any()


def flash_attn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, **arguments: Any) -> tuple[Tensor, Tensor]:
    """What FlashAttention-4's functions compute, in loops: output and log-sums; like them not causal unless told."""
    outputs, sums = [], []
    bounds = arguments["cu_seqlens_q"].tolist()
    assert bounds == arguments["cu_seqlens_k"].tolist()
    assert max(b - a for a, b in pairwise(bounds)) == arguments["max_seqlen_q"] == arguments["max_seqlen_k"]
    for start, stop in pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * arguments["softmax_scale"]
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:stop]))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, 1)


def flash_attn_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, log_sums: Tensor, **arguments: Any
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        again, sums = flash_attn(*inputs, **arguments)
    torch.testing.assert_close((again, sums), (out, log_sums))
    return torch.autograd.grad(again, inputs, grad)


def test_flash_attn_4_is_asked_for_what_every_kernel_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """How it is called, which no CPU and no GPU without it would show; what it computes is tests/gpu's."""
    package, cute, interface = (ModuleType(f"flash_attn{name}") for name in ("", ".cute", ".cute.interface"))
    cute.flash_attn_varlen_func = flash_attn  # type: ignore[attr-defined]
    interface._flash_attn_fwd = lambda *args, return_lse, **kwargs: flash_attn(*args, **kwargs)  # type: ignore[attr-defined]
    interface._flash_attn_bwd = flash_attn_backward  # type: ignore[attr-defined]
    for module in (package, cute, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    lengths = [5, 1, 9]
    q, k = (torch.randn(15, 2, 24, dtype=torch.float64).requires_grad_() for _ in range(2))
    v = torch.randn(15, 2, 16, dtype=torch.float64).requires_grad_()
    packing = kernels.Packing(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), 0.3)
    expected = kernels.ATTENTION["sdpa"](q, k, v, packing)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), grad)
    ours = FlashAttention4()
    torch.testing.assert_close(ours(q, k, v, packing), expected)
    results = ours.forward(q, k, v, packing)
    torch.testing.assert_close(results[0], expected)
    torch.testing.assert_close(ours.backward(grad, q, k, v, results, packing), gradients)
