"""Weights are their masters rounded, by what each element's place in the model decides, on every layout and resumed."""

import functools
import hashlib
import re
import shutil
from dataclasses import replace
from typing import Any

import deepspeed
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from src.callbacks.rounding_kept import RoundingKept
from src.callbacks.step_checkpoint import StepCheckpoint
from src.strategies import host_optimizer, sampled_change

from .spawn import run_distributed
from .training import Layout, Recipe, fit

BF16: dict[str, Any] = {"batch_size": 1, "precision": "bf16-true"}
OFFLOAD: dict[str, Any] = {"offload_optimizer": True, "offload_parameters": True}
LAYOUTS = [
    Layout(dp=1, sp=1, accumulation=2, **BF16),
    Layout(dp=2, sp=1, accumulation=1, sub_group_size=2000, experts_per_shard=4, ep=2, **BF16),
    Layout(dp=1, sp=2, accumulation=2, ep=2, **OFFLOAD, **BF16),
    Layout(dp=2, sp=1, accumulation=1, stage=2, **BF16),
    Layout(dp=1, sp=2, accumulation=2, stage=1, experts_per_shard=4, **BF16),
]
STEPS = 2
RECIPE = Recipe(steps=STEPS, mtp_loss_weight=0.0)


class State(pl.Callback):
    """Masters and weights, whole and by our names, before the first step and after the last."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note("start", pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note("end", pl_module)

    def _note(self, when: str, module: pl.LightningModule) -> None:
        self.found[when] = {}
        for name, parameter in module.model.named_parameters():  # type: ignore[union-attr]
            master = safe_get_full_fp32_param(parameter).flatten().clone()
            with deepspeed.zero.GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):
                self.found[when][name] = master, parameter.detach().flatten().clone()


class Logged(pl.Callback):
    """What the sample says, beside whole masters, weights and base after the last step."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        if "rounding/kept" in metrics:
            self.found.append((float(metrics["rounding/kept"]), float(metrics["rounding/error"])))


def train(layout: Layout, recipe: Recipe, directory: str, root: str, checkpoint: str | None = None) -> Any:
    host_optimizer.PIECE = 300  # several pieces, which end inside parameters
    sampled_change.TENSORS, sampled_change.ELEMENTS = 1000, 10**6  # all
    state, logged = State(), Logged()
    callbacks = (state, StepCheckpoint(STEPS, keep=9), RoundingKept(1), logged)
    fit(layout, recipe, directory, 20, root, more_callbacks=callbacks, checkpoint=checkpoint)
    return state.found | {"logged": logged.found}


def expected(name: str, master: Tensor, step: int) -> Tensor:
    """bf16 of a parameter's masters, in NumPy's unsigned integers; experts by their place among all of the layer."""
    match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate_up_proj|down_proj)", name)
    name, first = (f"{match[1]}.{match[3]}", int(match[2]) * len(master)) if match else (name, 0)
    key = np.frombuffer(hashlib.sha256(f"0:{step}:{name}:0".encode()).digest()[:8], dtype="<u4")
    x = np.arange(first, first + len(master), dtype=np.uint32) ^ key[0]
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = (x ^ x >> np.uint32(15) ^ key[1]) * np.uint32(0x846CA68B)
    x = (x ^ x >> np.uint32(16)) & np.uint32(0xFFFF)
    bits = (master.numpy().view(np.uint32) + x) & np.uint32(0xFFFF0000)
    return torch.from_numpy(bits.view(np.float32)).bfloat16()


def check(found: dict[str, tuple[Tensor, Tensor]], step: int) -> None:
    by_chance = 0
    for name, (master, weights) in found.items():
        assert torch.equal(weights, expected(name, master, step)), name
        by_chance += int((weights != master.bfloat16()).sum())
    assert by_chance > 1000


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights_are_masters_rounded_by_their_place(layout: Layout, directory: str, tmp_path: Any) -> None:
    ranks = run_distributed(train, layout.world_size, layout, RECIPE, directory, str(tmp_path))
    for found in ranks:
        check(found["start"], 0)  # an fp32 base
        check(found["end"], STEPS)
        for when in ("start", "end"):  # of all ranks: each may have experts of its own
            found[when] = {name: tensors for other in ranks for name, tensors in other[when].items()}
        change, left = (
            torch.cat([of(*found["end"][name]) - of(*found["start"][name]) for name in found["end"]]).double()
            for of in (lambda master, weights: master, lambda master, weights: weights.float())
        )
        left += torch.cat(
            [w.float() - m.bfloat16().float() for m, w in found["start"].values()]
        )  # of the base, rounded
        (kept, error), *_ = found["logged"]
        assert kept == pytest.approx(float(left @ change / (change @ change)), rel=1e-6)
        assert error == pytest.approx(float((left - change).norm() / change.norm()), rel=1e-6)


def test_fp32_runs_and_runs_without_their_base_log_nothing(directory: str, tmp_path: Any) -> None:
    fp32 = Layout(dp=2, sp=1, accumulation=1, batch_size=1)
    for found in run_distributed(train, 2, fp32, RECIPE, directory, str(tmp_path)):
        assert found["logged"] == []
    copy = shutil.copytree(directory, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    bf16, recipe = replace(fp32, precision="bf16-true"), replace(RECIPE, steps=STEPS + 1)
    go_on = functools.partial(train, bf16, recipe, str(copy), str(tmp_path / "more"))
    for found in run_distributed(go_on, 2, str(tmp_path / "checkpoints" / f"step={STEPS}.ckpt")):
        assert found["logged"] == []


def test_a_resumed_run_goes_on_with_the_same_weights(directory: str, tmp_path: Any) -> None:
    first, second = LAYOUTS[1], replace(LAYOUTS[2], experts_per_shard=4)
    begun, _ = run_distributed(train, 2, first, RECIPE, directory, str(tmp_path))
    go_on = functools.partial(train, second, replace(RECIPE, steps=STEPS + 1), directory, str(tmp_path / "more"))
    resumed, _ = run_distributed(go_on, 2, str(tmp_path / "checkpoints" / f"step={STEPS}.ckpt"))
    for name, (master, weights) in begun["end"].items():
        assert torch.equal(resumed["start"][name][0], master) and torch.equal(resumed["start"][name][1], weights), name
    check(resumed["end"], STEPS + 1)
