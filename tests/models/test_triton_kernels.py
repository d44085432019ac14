"""Each Triton kernel against the plain PyTorch function of the same name, on odd sizes too.

On a CUDA device, or on the CPU in Triton's interpreter:
`TRITON_INTERPRET=1 pytest tests/models/test_triton_kernels.py`.
"""

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from src.models.kernels import pointwise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.bfloat16]
# Both compute in fp32 and round once.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
ATOL = 1e-6


@pytest.fixture(scope="module")
def fast():  # type: ignore[no-untyped-def]
    from src.models.kernels import triton_kernels

    return triton_kernels


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def plain(name: str, monkeypatch: pytest.MonkeyPatch, *args: object) -> object:
    with monkeypatch.context() as patch:
        patch.setattr(pointwise, "_fast", lambda x: False)
        return getattr(pointwise, name)(*args)


def assert_all_close(ours: object, theirs: object, dtype: torch.dtype) -> None:
    assert isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=RTOL[dtype], atol=ATOL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(5, 7), (1, 1024), (3, 1500), (0, 8)])
@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu(  # type: ignore[no-untyped-def]
    fast, rows: int, width: int, dtype: torch.dtype, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    gate, up = random(rows, 2 * width, dtype=dtype).chunk(2, -1)
    weight = torch.rand(rows).to(DEVICE) if weighted else None
    grad = random(rows, width, dtype=dtype)
    expected = plain("swiglu", monkeypatch, gate, up, weight)
    torch.testing.assert_close(fast.swiglu(gate, up, weight), expected, rtol=RTOL[dtype], atol=ATOL)
    ours = fast.swiglu_backward(gate, up, grad, weight)
    assert_all_close(ours, plain("swiglu_backward", monkeypatch, gate, up, grad, weight), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_rows(fast, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    tokens, top_k, width, sizes = 6, 3, 1100, [4, 0, 13, 1]
    rows = [random(size, width, dtype=dtype) for size in sizes]
    slots = torch.randperm(tokens * top_k).view(tokens, top_k)
    parts = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[slots].to(DEVICE)
    slots = slots.to(DEVICE)
    expected = plain("sum_rows", monkeypatch, rows, slots, parts)
    for ints in (torch.int64, torch.int32):
        ours = fast.sum_rows(rows, slots.to(ints), parts.to(ints))
        torch.testing.assert_close(ours, expected, rtol=RTOL[dtype], atol=ATOL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "nope", "rope", "value"), [(3, 16, 8, 12), (16, 128, 64, 128), (9, 24, 24, 40)])
def test_assemble_heads(  # type: ignore[no-untyped-def]
    fast, heads: int, nope: int, rope: int, value: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tokens = 5
    q, kv = random(tokens, heads, nope + rope, dtype=dtype), random(tokens, heads, nope + value, dtype=dtype)
    k_rope = random(tokens, 3 * rope, dtype=dtype)[:, rope : 2 * rope]  # a slice of the latents
    angles = random(tokens, rope // 2)
    inputs = [x.clone().requires_grad_() for x in (q, kv, k_rope)]
    arguments = angles.cos(), angles.sin(), nope
    expected = plain("assemble_heads", monkeypatch, *inputs, *arguments)
    assert isinstance(expected, tuple)
    grads = [torch.randn_like(x) for x in expected]
    wanted = torch.autograd.grad(expected, inputs, grads)
    k = fast.assemble_heads(q, kv, k_rope, *arguments, value)  # turns q in place
    assert_all_close((q, k), tuple(x.detach() for x in expected[:2]), dtype)
    d_q, d_k, d_v = (g.clone() for g in grads)
    d_kv, d_rope = fast.assemble_heads_backward(d_q, d_k, d_v, *arguments)
    rtol, atol = (RTOL[dtype], ATOL) if dtype == torch.float32 else (3e-2, 3e-2)  # autograd sums in bf16
    for ours, theirs in zip((d_q, d_kv, d_rope), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(4, 11), (3, 8192), (2, 9001), (0, 5)])
def test_cross_entropy_rows(fast, rows: int, vocabulary: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    logits = 5 * random(rows, vocabulary)
    labels = torch.randint(vocabulary, (rows,)).to(DEVICE)
    if rows:
        labels[0] = logits[0].argmax()

    def outputs() -> tuple[Tensor, Tensor, Tensor]:
        grad = torch.full((rows, vocabulary), float("nan"), dtype=dtype, device=DEVICE)
        return (
            torch.full((rows,), float("nan"), device=DEVICE),
            torch.zeros(rows, dtype=torch.bool, device=DEVICE),
            grad,
        )

    exact = logits.double().requires_grad_()
    each = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    each.sum().backward()
    loss, correct, grad = outputs()
    fast.cross_entropy_rows(logits.clone(), labels, loss, correct, grad)
    torch.testing.assert_close(loss, each.detach().float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(correct, logits.argmax(-1) == labels)
    assert exact.grad is not None
    torch.testing.assert_close(grad, exact.grad.to(dtype), rtol=RTOL[dtype], atol=ATOL)
    without, _, _ = outputs()
    fast.cross_entropy_rows(logits, labels, without, correct, None)
    assert torch.equal(without, loss)
