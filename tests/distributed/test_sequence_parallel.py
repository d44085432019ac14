"""The SP forward and backward over gloo processes equal one process: loss, every gradient, each collective."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from src.models.deepseek_v3 import DeepseekV3ForCausalLM, config_from_dict
from src.models.loss import IGNORE_INDEX
from src.strategies.sequence_parallel import ProcessGroupSP
from tests.models.tiny import DEEPSEEK_V3, MOONLIGHT, relative

from .spawn import run_distributed

LENGTHS = [37, 1, 50, 8]  # 96 tokens: documents cross the bounds of 2 and of 4 shards


def build(fields: dict[str, Any]) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config_from_dict(fields), experts_per_shard=2)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    for buffer in model.buffers():
        torch.nn.init.normal_(buffer, std=0.2)
    return model


def row() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(96, (2, sum(LENGTHS)), generator=generator)
    labels[torch.rand(len(labels), generator=generator) < 0.3] = IGNORE_INDEX
    return ids, labels, torch.tensor([0, *LENGTHS]).cumsum(0).int()


def forward_backward(fields: dict[str, Any], sp_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    model = build(fields)
    ids, labels, cu_seqlens = row()
    if sp_size > 1:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
        assert group is not None
        sp = ProcessGroupSP(group)
        model.set_sequence_parallel(sp)
        ids, labels = (x.chunk(sp.size)[sp.rank] for x in (ids, labels))
    loss = model(ids, labels, cu_seqlens, max(LENGTHS)).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if sp_size > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
        total = loss.detach()
        dist.all_reduce(total)
        dist.destroy_process_group()
    return (total if sp_size > 1 else loss).item(), gradients


@pytest.mark.parametrize(("fields", "sp_size"), [(DEEPSEEK_V3, 2), (DEEPSEEK_V3, 4), (MOONLIGHT, 2)])
def test_sp_equals_one_process(fields: dict[str, Any], sp_size: int) -> None:
    loss, gradients = forward_backward(fields, 1)
    for shard_loss, shard_gradients in run_distributed(forward_backward, sp_size, fields, sp_size):
        assert shard_loss == pytest.approx(loss, rel=1e-6)
        assert shard_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert relative(shard_gradients[name], gradient) < 1e-5, name


def collectives(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    sp = ProcessGroupSP(dist.group.WORLD)
    results = {}
    weights = torch.arange(1.0, 1 + 24).to(dtype) * (sp.rank + 1)
    for name, shape in {"all_gather": (4, 3), "all_to_all": (2, 6), "all_reduce": (4, 3)}.items():
        x = (torch.arange(12.0).view(shape) + 100 * sp.rank).to(dtype).requires_grad_()
        out = getattr(sp, name)(x)
        (out.flatten() * weights[: out.numel()]).sum().backward()
        results[name], results[f"{name}.grad"] = out.detach(), x.grad
    dist.destroy_process_group()
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_collective_and_its_gradient(dtype: torch.dtype) -> None:
    first, second = run_distributed(collectives, 2, dtype)
    x = [torch.arange(12.0), torch.arange(12.0) + 100]
    w = [torch.arange(1.0, 25.0), torch.arange(1.0, 25.0) * 2]
    for rank, result in enumerate((first, second)):
        expected = {
            "all_gather": torch.cat(x).view(8, 3),
            "all_gather.grad": (w[0] + w[1])[rank * 12 : rank * 12 + 12].view(4, 3),
            "all_to_all": torch.stack([x[0].view(2, 6)[rank], x[1].view(2, 6)[rank]]),
            "all_to_all.grad": torch.stack([w[0][:12].view(2, 6)[rank], w[1][:12].view(2, 6)[rank]]),
            "all_reduce": (x[0] + x[1]).view(4, 3),
            "all_reduce.grad": (w[0] + w[1])[:12].view(4, 3),
        }
        for name, tensor in expected.items():
            assert torch.equal(result[name], tensor.to(dtype)), (rank, name)
