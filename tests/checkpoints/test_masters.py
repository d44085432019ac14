"""Training starts from the file's values to the bit: fp32 masters against FP8 dequantised block by block."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import lightning.pytorch as pl
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from src.callbacks.step_checkpoint import StepCheckpoint
from src.weights.hf_reader import HFDirectorySource
from src.weights.key_map import mtp_copies
from tests.checkpoints.tiny import LAYERS, dequantised, stacked, stored
from tests.distributed.spawn import run_distributed
from tests.distributed.training import Layout, Recipe, fit

BF16: dict[str, Any] = {"accumulation": 1, "batch_size": 1, "precision": "bf16-true"}
OFFLOAD: dict[str, Any] = {"offload_optimizer": True, "offload_parameters": True}
LAYOUTS = [
    Layout(dp=2, sp=1, sub_group_size=100_000, **BF16),
    Layout(dp=1, sp=2, experts_per_shard=4, **OFFLOAD, **BF16),
    Layout(dp=2, sp=1, stage=2, **BF16),
    Layout(dp=1, sp=2, stage=1, **BF16),
    Layout(dp=2, sp=1, accumulation=1, batch_size=1),  # fp32, where there is nothing to round
]
FROZEN = ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight")


class Start(pl.Callback):
    """Masters and the model's own weights, whole and by name, when training starts."""

    def __init__(self) -> None:
        self.masters: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in pl_module.model.named_parameters():  # type: ignore[union-attr]
            if parameter.requires_grad:
                self.masters[name] = safe_get_full_fp32_param(parameter).clone()
            with deepspeed.zero.GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):
                self.weights[name] = parameter.detach().clone()


def start(layout: Layout, directory: str, root: str, checkpoint: str | None = None, steps: int = 1) -> dict[str, Any]:
    """A run's masters and weights before its first step, and the bytes of tensors that this rank has read."""
    sources: list[HFDirectorySource] = []
    opened = HFDirectorySource.__init__

    def noted(self: HFDirectorySource, *args: Any, **kwargs: Any) -> None:
        opened(self, *args, **kwargs)
        sources.append(self)

    HFDirectorySource.__init__ = noted  # type: ignore[method-assign]
    found = Start()
    recipe = Recipe(steps=steps, mtp_loss_weight=0.1, freeze=FROZEN, weight_rounding="nearest")
    callbacks = (found, StepCheckpoint(1, keep=9))
    result = fit(layout, recipe, directory, 8, root, more_callbacks=callbacks, checkpoint=checkpoint)
    read = sum(source.bytes_read for source in sources)
    return {"masters": found.masters, "weights": found.weights, "read": read, "end": result["weights"]}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_masters_are_the_files_values(layout: Layout, fp8: Path, tmp_path: Path) -> None:
    ranks: list[dict[str, Any]] = run_distributed(start, 2, layout, str(fp8), str(tmp_path))
    expected = stacked(dequantised(stored(fp8)), layout.experts_per_shard)
    assert sum(not torch.equal(t, t.bfloat16().float()) for t in expected.values()) > 20  # bf16 would round them
    for rank in ranks:
        assert rank["weights"].keys() == {name for name in expected if "bias" not in name} - mtp_copies(LAYERS).keys()
        assert rank["masters"].keys() == rank["weights"].keys() - set(FROZEN)
        for name, master in rank["masters"].items():
            assert torch.equal(master.view(-1), expected[name].float().view(-1)), name
        for name, weight in rank["weights"].items():
            assert torch.equal(weight, expected[name].to(weight.dtype)), name
    weights = stored(fp8)
    needed = sum(tensor.nbytes for tensor in weights.values()) - sum(weights[n].nbytes for n in mtp_copies(LAYERS))
    # Every byte once; a range of FP8 comes with the scales of all its blocks, some of which its neighbour reads too.
    assert needed <= sum(rank["read"] for rank in ranks) / (1 if layout.stage == 3 else 2) < 1.01 * needed


def test_a_resumed_run_has_the_checkpoints_masters(fp8: Path, tmp_path: Path) -> None:
    first, other = LAYOUTS[0], replace(LAYOUTS[1], accumulation=2, experts_per_shard=2)
    (begun, _) = run_distributed(start, 2, first, str(fp8), str(tmp_path))
    checkpoint = str(tmp_path / "checkpoints" / "step=1.ckpt")
    (resumed, _) = run_distributed(start, 2, other, str(fp8), str(tmp_path / "more"), checkpoint, 2)
    assert resumed["read"] == 0
    common = begun["end"].keys() & resumed["masters"].keys()
    assert len(common) > 20
    for name in common:
        assert torch.equal(resumed["masters"][name].view(-1), begun["end"][name].view(-1)), name
