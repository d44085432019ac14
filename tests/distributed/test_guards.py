"""What stops a run before it harms the weights, and what is left out of training on request."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from src.models.sft_module import Batch, SFTModule
from tests.models.tiny import DEEPSEEK_V3, oracle

from .spawn import run_distributed
from .training import Layout, Recipe, documents, fit, save_model

LAYOUT = Layout(dp=1, sp=2, accumulation=2, batch_size=2)
POISON = 7  # a token whose embedding is infinite


class Weights(pl.Callback):
    """This rank's partitions when training starts."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.module: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.module = pl_module
        self.before = [t.clone() for t in self.now()]

    def now(self) -> list[Tensor]:
        return [getattr(p, "ds_tensor", p) for p in self.module.parameters()]


class InfiniteGradient(SFTModule):
    """A loss that is finite, with a gradient that is not."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + (loss - loss.detach()).abs().sqrt()


class InfiniteExpert(SFTModule):
    """A gradient that is not finite in an expert of the last rank alone."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == 0 and self.global_rank == self.trainer.world_size - 1:
            expert = [p for name, p in self.named_parameters() if ".mlp.experts." in name][-1]
            expert.register_hook(lambda grad: grad * float("nan"))
        return super().training_step(batch, batch_idx)


def failing_fit(directory: str, count: int, module_class: type[SFTModule], stage: int, ep: int = 1) -> tuple[str, bool]:
    weights = Weights()
    layout = Layout(dp=1, sp=2, accumulation=2, batch_size=2, stage=stage, ep=ep)
    try:
        fit(layout, Recipe(), directory, count, module_class=module_class, more_callbacks=(weights,))
    except FloatingPointError as error:
        same = all(torch.equal(a, b) for a, b in zip(weights.before, weights.now(), strict=True))
        return str(error), same
    return "", False


def test_a_non_finite_loss_names_the_rows_and_leaves_the_weights(tmp_path: Path) -> None:
    model = oracle(DEEPSEEK_V3)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("inf")
    directory = save_model(model, DEEPSEEK_V3, tmp_path)
    results = run_distributed(failing_fit, 2, directory, 8, SFTModule, 3)
    poisoned = {d.source for d in documents(8) if POISON in d.input_ids}
    named = set()
    for message, same in results:
        assert "optimizer step 1: the loss is not finite" in message and same
        named |= {source for source in (d.source for d in documents(8)) if f"{source}," in message + ","}
        named |= {d.source for d in documents(8) if f"{d.source}." in message}
    assert named and named <= poisoned


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_non_finite_gradient_leaves_the_weights(stage: int, directory: str) -> None:
    for message, same in run_distributed(failing_fit, 2, directory, 8, InfiniteGradient, stage):
        assert "optimizer step 1: the gradient is not finite though the loss is" in message
        assert "memory:" in message and same


def test_every_rank_leaves_out_a_step_that_one_ranks_experts_spoil(directory: str) -> None:
    for message, same in run_distributed(failing_fit, 2, directory, 8, InfiniteExpert, 3, 2):
        assert "optimizer step 1: the gradient is not finite though the loss is" in message and same


def test_frozen_parameters_stay_and_the_others_move(directory: str) -> None:
    frozen = ("model.embed_tokens*", "*.mlp.gate.weight", "model.layers.1.mlp.experts.[01].*")
    result = run_distributed(fit, 2, LAYOUT, Recipe(freeze=frozen, steps=2), directory, 20)[0]
    before = dict(oracle(DEEPSEEK_V3).named_parameters())
    for name, after in result["weights"].items():
        if name.endswith("e_score_correction_bias"):
            continue
        unchanged = torch.equal(after, before[name])
        assert unchanged == (name == "model.embed_tokens.weight" or name.endswith("mlp.gate.weight")), name
    experts = "model.layers.1.mlp.experts.down_proj"  # the first shard, two experts, is frozen
    assert torch.equal(result["weights"][experts][:2], before[experts][:2])
    assert not torch.equal(result["weights"][experts][2:4], before[experts][2:4])


def test_a_part_of_shared_experts_is_not_frozen_on_one_rank_alone(directory: str) -> None:
    recipe, message = (
        Recipe(freeze=("*.layers.1.mlp.experts.[01].*",)),
        r"matches one of model\.layers\.1\.mlp\.experts",
    )
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=message):
        run_distributed(fit, 2, replace(LAYOUT, ep=2), recipe, directory, 8)


def test_a_whole_group_may_be_frozen(directory: str) -> None:
    recipe = Recipe(freeze=("*norm.weight", "*.bias"), steps=2)
    assert len(run_distributed(fit, 1, Layout(1, 1, 1, 4), recipe, directory, 20)[0]["losses"]) == 2


def test_a_pattern_that_matches_nothing_is_refused(directory: str) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="no parameter's name matches 'embed'"):
        run_distributed(fit, 1, Layout(1, 1, 1, 1), Recipe(freeze=("embed",)), directory, 8)
