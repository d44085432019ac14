"""The SP forward and backward over gloo processes equal one process: losses, every gradient, each collective."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from src.datamodules.collate import Document, collate, shard
from src.models.deepseek_v3 import DeepseekV3ForCausalLM, LossWeights, config_from_dict
from src.strategies.parallelize import apply_activation_checkpointing
from src.strategies.sequence_parallel import ProcessGroupSP
from tests.models.tiny import DEEPSEEK_V3, MOONLIGHT, relative

from .spawn import run_distributed

LENGTHS = [37, 1, 45, 5]  # documents cross the bounds of 2 and of 4 shards of 48 and of 24 tokens
PADDED_TO = 32  # 88 tokens to 96 under SP; one process has no padding
VOCABULARY = 16  # few enough that random weights predict some targets
WEIGHTS = LossWeights(cross_entropy=0.01, mtp=0.003, balance=0.002)


def build(fields: dict[str, Any]) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(
        config_from_dict(fields | {"vocab_size": VOCABULARY}), experts_per_shard=2, with_mtp=True
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    for router in model.routers:
        torch.nn.init.normal_(router.e_score_correction_bias, std=0.2)
    model.set_balance(True)
    return model


def documents() -> list[Document]:
    """Random tokens, about two thirds of them targets; those about the shards' bounds all are."""
    generator = np.random.default_rng(1)
    ids = generator.integers(VOCABULARY, size=sum(LENGTHS)).astype(np.int32)
    wanted = generator.random(len(ids)) > 0.3
    for bound in (24, 48, 72):
        wanted[bound - 2 : bound + 3] = True
    bounds = np.cumsum(LENGTHS)[:-1]
    spans = [np.flatnonzero(mask)[:, None] + [0, 1] for mask in np.split(wanted, bounds)]
    return [Document(x, own.astype(np.int32), "random") for x, own in zip(np.split(ids, bounds), spans, strict=True)]


def forward_backward(fields: dict[str, Any], sp_size: int, checkpointing: bool) -> dict[str, Any]:
    """Everything summed over the ranks, as the whole row's."""
    model = build(fields)
    batch = collate(documents(), PADDED_TO if sp_size > 1 else 1)
    if sp_size > 1:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
        assert group is not None
        sp = ProcessGroupSP(group)
        model.set_sequence_parallel(sp)
        batch = shard(batch, sp.rank, sp.size)
    if checkpointing:
        apply_activation_checkpointing(model)
    del batch["sources"]
    losses = model(**batch, weights=WEIGHTS)
    losses.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loads = torch.stack([router.load for router in model.routers])
    scalars = torch.stack([x.detach().double() for x in losses[:-1]])
    if sp_size > 1:
        for tensor in (scalars, loads, *gradients.values()):
            dist.all_reduce(tensor)
        token_losses = sp.all_gather(losses.token_losses)
        dist.destroy_process_group()
    else:
        token_losses = losses.token_losses
    names = losses._fields[:-1]
    return {
        "sums": dict(zip(names, scalars.tolist(), strict=True)),
        "token_losses": token_losses[: sum(LENGTHS)],
        "loads": loads,
        "gradients": gradients,
    }


@pytest.mark.parametrize(
    ("fields", "sp_size", "checkpointing"),
    [(DEEPSEEK_V3, 2, False), (DEEPSEEK_V3, 4, False), (DEEPSEEK_V3, 4, True), (MOONLIGHT, 2, True)],
)
def test_sp_equals_one_process(fields: dict[str, Any], sp_size: int, checkpointing: bool) -> None:
    expected = forward_backward(fields, 1, checkpointing=False)
    assert all(value > 0 for value in expected["sums"].values())
    for found in run_distributed(forward_backward, sp_size, fields, sp_size, checkpointing):
        assert found["sums"] == pytest.approx(expected["sums"], rel=1e-6)
        torch.testing.assert_close(found["token_losses"], expected["token_losses"], rtol=1e-5, atol=1e-5)
        assert torch.equal(found["loads"], expected["loads"])
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            gathered = found["gradients"][name]
            # Equal, where all are zero: experts without tokens.
            assert torch.equal(gathered, gradient) or relative(gathered, gradient) < 1e-5, name


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
