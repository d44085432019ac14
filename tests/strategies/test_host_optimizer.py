"""A step on the host equals DeepSpeed's own, and holds what the file says: 16 bytes a parameter, from the start on."""

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from src.strategies import host_optimizer
from src.strategies.host_optimizer import HostAdamW, allocated_once, step_in_pieces
from src.strategies.operators import prepare_builds
from tests.distributed.spawn import run_distributed

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}


def model() -> nn.Module:  # even sizes: DeepSpeed leaves the padding of a partition uninitialised
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(38, 54), nn.GELU(), nn.Linear(54, 30))


def train(ours: bool, precision: str, clip: float, steps: int) -> dict[str, Any]:
    """Steps of two accumulated micro-steps with the optimizer on the host: norms, weights and the optimizer's state."""
    deepspeed.init_distributed("gloo")
    module = model()
    decayed, others = [p for p in module.parameters() if p.ndim > 1], [p for p in module.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = HostAdamW(groups, **SETTINGS) if ours else DeepSpeedCPUAdam(groups, adamw_mode=True, **SETTINGS)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "sub_group_size": 900},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
        module.bfloat16()
    if ours:
        with allocated_once():
            engine, *_ = deepspeed.initialize(model=module, config=config, optimizer=optimizer)
        step_in_pieces(engine.optimizer)
    else:
        engine, *_ = deepspeed.initialize(model=module, config=config, optimizer=optimizer)
    zero: Any = engine.optimizer
    masters = zero.fp32_partitioned_groups_flat
    held = {
        "states before the first step": [len(optimizer.state[flat]) for flat in masters],
        "one gradient": masters[0].grad is not None
        and masters[0].grad.data_ptr() == zero.grad_partitions_flat_buffer.data_ptr(),
    }
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    norms = []
    for micro_step in range(2 * steps):
        x = torch.randn(8, 38, generator=generator)
        engine.backward(engine(x.to(next(module.parameters()).dtype)).float().square().sum())
        engine.step()
        if micro_step % 2:
            norms.append(float(engine.get_global_grad_norm()))
    return {
        "held": held,
        "norms": norms,
        "weights": [p.ds_tensor.clone() for p in module.parameters()],  # type: ignore[attr-defined]
        "masters": [flat.detach().clone() for flat in masters],
        "states": [dict(optimizer.state[flat]) for flat in masters],
    }


def in_small_pieces(*args: Any) -> dict[str, Any]:
    prepare_builds()
    host_optimizer.PIECE = 96
    return train(*args)


@pytest.mark.parametrize(("precision", "clip"), [("fp32", 0.0), ("fp32", 0.5), ("bf16", 0.5), ("bf16", 1e9)])
def test_a_step_is_deepspeeds(precision: str, clip: float) -> None:
    theirs = run_distributed(train, 2, False, precision, clip, 3)
    for mine, other in zip(run_distributed(in_small_pieces, 2, True, precision, clip, 3), theirs, strict=True):
        assert mine["norms"] == pytest.approx(other["norms"], rel=1e-6) and max(mine["norms"]) > 1
        assert len(mine["masters"]) == len(other["masters"]) > 2  # sub-groups, of both parameter groups
        for a, b in zip(mine["masters"], other["masters"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(mine["states"], other["states"], strict=True):
            assert a["step"] == b["step"] == 3
            torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a["exp_avg_sq"], b["exp_avg_sq"], rtol=1e-5, atol=1e-6)
        flat = torch.cat([w.float() for w in mine["weights"]])
        masters = torch.cat([m.bfloat16().float() if precision == "bf16" else m for m in mine["masters"]])
        assert torch.equal(flat.sort().values, masters.sort().values)  # rounded once; grouped otherwise


def test_everything_is_there_before_the_first_step_and_once() -> None:
    (mine,), (theirs,) = (run_distributed(in_small_pieces, 1, ours, "bf16", 1.0, 1) for ours in (True, False))
    assert all(n == 3 for n in mine["held"]["states before the first step"]) and mine["held"]["one gradient"]
    assert not any(theirs["held"]["states before the first step"]) and not theirs["held"]["one gradient"]


def pieces_of(size: int) -> list[torch.Tensor]:
    prepare_builds()
    host_optimizer.PIECE = size
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(1000))
    optimizer = HostAdamW([parameter], **SETTINGS)
    heard = []
    optimizer.updated = lambda p, start, stop: heard.append((start, stop))
    for _ in range(5):
        parameter.grad = torch.randn(1000)
        optimizer.step()
    assert heard == 5 * [(start, min(start + size, 1000)) for start in range(0, 1000, size)]
    return [parameter.detach(), optimizer.state[parameter]["exp_avg_sq"]]


def test_pieces_do_not_change_a_bit() -> None:
    whole, parts = (run_distributed(pieces_of, 1, size)[0] for size in (1000, 64))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
