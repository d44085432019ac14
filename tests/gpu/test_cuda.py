"""What only a CUDA device can show: the kernels it picks, bf16, and runs that repeat bit for bit. `pytest -m gpu`."""

import contextlib
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src.models import kernels
from src.models.deepseek_v3 import DeepseekV3ForCausalLM, config_from_dict
from src.models.deepseek_v3.experts import Experts
from src.models.deepseek_v3.recompute import recompute
from tests.models.tiny import DEEPSEEK_V3, relative

pytestmark = pytest.mark.gpu
CUDA, BF16 = torch.device("cuda"), torch.bfloat16
# Widths that grouped_mm and flash attention take in bf16: multiples of 16 bytes.
FIELDS = DEEPSEEK_V3 | {
    "hidden_size": 256,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 2048,
}


@pytest.mark.parametrize("name", ["auto", *kernels.ATTENTION])
@pytest.mark.parametrize("lengths", [[300, 1, 77, 128], [1], [511]])
def test_attention_agrees_with_fp32(name: str, lengths: list[int]) -> None:
    try:
        attend = kernels.resolve_attention(name, CUDA, BF16)
    except ValueError as error:
        pytest.skip(str(error))
    tokens, heads, scale = sum(lengths), 4, 0.1
    torch.manual_seed(0)
    q, k = (torch.randn(tokens, heads, 192, device=CUDA, dtype=BF16).requires_grad_() for _ in range(2))
    v = torch.randn(tokens, heads, 128, device=CUDA, dtype=BF16).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths], device=CUDA).cumsum(0).int()
    grad = torch.randn(tokens, heads, 128, device=CUDA, dtype=BF16)
    packing = kernels.Packing(cu_seqlens, max(lengths), scale)
    attend(q, k, v, packing).backward(grad)
    results = attend.forward(q.detach(), k.detach(), v.detach(), packing)
    halves = attend.backward(grad, q.detach(), k.detach(), v.detach(), results, packing)
    out = results[0]

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    document = torch.repeat_interleave(torch.arange(len(lengths), device=CUDA), torch.tensor(lengths, device=CUDA))
    mask = (document[:, None] == document) & torch.ones(tokens, tokens, device=CUDA, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", exact[0], exact[1]) * scale
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), exact[2])
    expected.backward(grad.double())
    assert relative(out.double(), expected) < 1e-2
    for ours, half, theirs in zip((q, k, v), halves, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        if theirs.grad.norm() > 0:  # one-token documents: no gradient reaches queries and keys
            assert relative(ours.grad.double(), theirs.grad) < 2e-2
            assert relative(half.double(), theirs.grad) < 2e-2


def expert_gradients(device: torch.device, dtype: torch.dtype, chosen: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    experts = Experts(8, 2, 256, 64).to(device, dtype)
    for index, parameter in enumerate(experts.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator).to(BF16))
    generator = torch.Generator().manual_seed(99)
    x = torch.randn(len(chosen), 256, generator=generator).to(BF16).to(device, dtype).requires_grad_()
    weights = torch.rand(chosen.shape, generator=generator).to(device).requires_grad_()
    out = experts(x, weights, experts.set_out(x, weights, experts.route(chosen.to(device))))
    out.backward(torch.randn(out.shape, generator=generator).to(BF16).to(device, dtype))
    return [t for t in (out.detach(), x.grad, weights.grad, *(p.grad for p in experts.parameters())) if t is not None]


@pytest.mark.parametrize("kind", ["balanced", "two experts", "one token"])
def test_experts_agree_with_fp32_and_repeat(kind: str) -> None:
    torch.manual_seed(1)
    tokens = 1 if kind == "one token" else 500
    columns = 2 if kind == "two experts" else 8
    chosen = torch.rand(tokens, columns).argsort(-1)[:, :2]
    first = expert_gradients(CUDA, BF16, chosen)
    again = expert_gradients(CUDA, BF16, chosen)
    expected = expert_gradients(torch.device("cpu"), torch.float32, chosen)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for ours, theirs in zip(first, expected, strict=True):
        assert torch.equal(ours.cpu().float(), theirs) or relative(ours.cpu().float(), theirs) < 2e-2


def loss_and_gradients(
    device: torch.device, dtype: torch.dtype, kept: str = "recompute"
) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config_from_dict(FIELDS), experts_per_shard=2)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.05)
        parameter.data = parameter.data.to(BF16).float()
    model = model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.run_layer = partial(
        checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), recompute())
    )
    model.set_kept(kept, "offload" if kept == "offload" else "keep")
    ids, labels = torch.randint(96, (2, 384), generator=torch.Generator().manual_seed(0)).to(device)
    cu_seqlens = torch.tensor([0, 200, 201, 384], dtype=torch.int32, device=device)
    loss = model(ids, labels, cu_seqlens, 200).loss / 384
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


# What lies above the last attention is ours and uses no atomics. Below it only near: the attention kernels' backward
# adds the queries' gradient atomically.
REPEATED = ("lm_head", "model.norm", "model.layers.2.mlp.", "model.layers.2.post_attention_layernorm")


@pytest.mark.parametrize("kept", ["recompute", "keep", "offload"])
def test_the_model_in_bf16_repeats_and_stays_near_fp32(kept: str) -> None:
    loss, gradients = loss_and_gradients(CUDA, BF16)
    again, same = loss_and_gradients(CUDA, BF16, kept)
    exact, reference = loss_and_gradients(torch.device("cpu"), torch.float32)
    assert loss == again
    assert loss == pytest.approx(exact, rel=1e-2)
    assert sum(name.startswith(REPEATED) for name in gradients) > 10
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same[name]) or not name.startswith(REPEATED), name
        assert relative(same[name], gradient) < 1e-2, name
        if ".experts." not in name and ".gate." not in name:  # close calls of the router go the other way in bf16
            assert relative(gradient, reference[name]) < 0.2, name
