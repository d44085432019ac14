"""A run that goes on from another layout's checkpoint is the run that was never interrupted."""

import functools
import math
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import lightning.pytorch as pl
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from src.callbacks.step_checkpoint import StepCheckpoint
from src.checkpoints.zero_reader import ZeroCheckpointSource
from src.strategies.reshard import restore
from src.weights import load
from src.weights.key_map import PerExpert, StackedExperts
from src.weights.source import chunks
from tests.models.tiny import DEEPSEEK_V3, MtpModel, mtp_oracle, oracle, relative

from .spawn import run_distributed
from .training import Layout, Recipe, fit, save_model

# Latent norms of 5 and 11 elements: on four ranks one has a single element of the five, another nothing but padding.
FIELDS = DEEPSEEK_V3 | {"q_lora_rank": 5, "kv_lora_rank": 11}
DOCUMENTS = 60  # 18 rows, 4 a step: an epoch of five steps, the fifth filled up with empty rows
STEPS, DONE = 6, 4  # the run ends in its second epoch; what resumes has done four steps of its first
# Weight decay, clipping, MTP, balance loss and moving router biases all on; MTP where transformers has the oracle.
RECIPE = Recipe(mtp_loss_weight=0.3 if MtpModel is not None else 0.0, steps=STEPS)
CHUNK = 1000  # elements, so that tiny tensors are read in several
SLOTS = ("fp32", "exp_avg", "exp_avg_sq")

OFFLOAD: dict[str, Any] = {"offload_optimizer": True, "offload_parameters": True}
SOURCES = {
    "2x2": Layout(dp=2, sp=2, accumulation=2, batch_size=1),
    "4x1 ep 2": Layout(dp=4, sp=1, accumulation=1, batch_size=1, sub_group_size=2000, ep=2),
    "1x2 offloaded": Layout(dp=1, sp=2, accumulation=2, batch_size=2, experts_per_shard=4, **OFFLOAD),
    "2x1 stage 1": Layout(dp=2, sp=1, accumulation=2, batch_size=1, stage=1),
    "1x2 stage 2": Layout(dp=1, sp=2, accumulation=4, batch_size=1, stage=2),
    "1x1 stage 0": Layout(dp=1, sp=1, accumulation=1, batch_size=4, stage=0),
}


class Killed(Exception):
    pass


class Kill(pl.Callback):
    """Ends the run after DONE steps as a power cut would."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == DONE:
            raise Killed


def begun(layout: Layout, recipe: Recipe, directory: str, root: str, killed: bool) -> dict[str, Any]:
    """A run from the beginning, with a checkpoint after DONE steps."""
    pl.seed_everything(5, verbose=False)
    callbacks: list[pl.Callback] = [StepCheckpoint(DONE, keep=9)]
    if not killed:
        return fit(layout, recipe, directory, DOCUMENTS, root, more_callbacks=tuple(callbacks))
    with pytest.raises(Killed):
        fit(layout, recipe, directory, DOCUMENTS, root, more_callbacks=(*callbacks, Kill()))
    return {}


class State(pl.Callback):
    """Masters, moments and the model's own weights when training starts."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = trainer.strategy.deepspeed_engine.optimizer  # type: ignore[attr-defined]
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 do so after a step
            optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in pl_module.model.named_parameters():  # type: ignore[union-attr]
            master = safe_get_full_fp32_param(parameter)
            if master is not None:
                self.found[name] = {"fp32": master.clone()}
                for slot in SLOTS[1:]:
                    self.found[name][slot] = safe_get_full_optimizer_state(parameter, slot).clone()
                with deepspeed.zero.GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):
                    self.found[name]["model"] = parameter.detach().clone()


def resumed(layout: Layout, recipe: Recipe, directory: str, checkpoint: str) -> dict[str, Any]:
    """Goes on from a checkpoint; also returns what was read, from whose files, and the state that it went on with."""
    reads: list[tuple[str, str, int, int]] = []
    files: set[int] = set()
    read, part = ZeroCheckpointSource.read, ZeroCheckpointSource._flat

    def noted_read(self: ZeroCheckpointSource, name: str, start: int, stop: int) -> Tensor:
        reads.append((self._slot, name, start, stop))
        return read(self, name, start, stop)

    def noted_flat(self: ZeroCheckpointSource, rank: int, flat: int | str) -> Tensor:
        files.add(rank)
        return part(self, rank, flat)

    ZeroCheckpointSource.read, ZeroCheckpointSource._flat = noted_read, noted_flat  # type: ignore[method-assign]
    load.chunks = functools.partial(chunks, step=CHUNK)
    pl.seed_everything(6, verbose=False)  # the checkpoint's random state has to take its place
    state = State()
    try:
        result = fit(layout, recipe, directory, DOCUMENTS, more_callbacks=(state,), checkpoint=checkpoint)
    except ValueError as error:
        return {"error": str(error), "reads": reads}
    return result | {"reads": reads, "files": files, "state": state.found}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = oracle(FIELDS)
    block = mtp_oracle(model) if MtpModel is not None else None
    return save_model(model, FIELDS, tmp_path_factory.mktemp("model"), block)


@pytest.fixture(scope="module")
def whole(directory: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """The run on 2x2 that was never interrupted, by rank, and its checkpoint after DONE steps."""
    root = tmp_path_factory.mktemp("whole")
    ranks = run_distributed(begun, 4, SOURCES["2x2"], RECIPE, directory, str(root), False)
    return ranks, root / f"checkpoints/step={DONE}.ckpt"


@pytest.fixture(scope="module")
def checkpoint_of(directory: str, whole: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By a source's name the checkpoint that it left when it was killed, made once."""
    made = {"2x2": whole[1]}

    def checkpoint(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp("source")
            run_distributed(begun, SOURCES[name].world_size, SOURCES[name], RECIPE, directory, str(root), True)
            made[name] = root / f"checkpoints/step={DONE}.ckpt"
        return made[name]

    return checkpoint


def rows_by_step(ranks: list[dict[str, Any]], layout: Layout) -> list[list[str]]:
    """The documents of each step, sorted: of one rank of each SP group, since all of a group read the same."""
    by_step = []
    for index in range(0, len(ranks[0]["sources"]), layout.accumulation):
        micro = [s for r in ranks[:: layout.sp] for s in r["sources"][index : index + layout.accumulation]]
        by_step.append(sorted(document for documents in micro for document in documents))
    return by_step


def assert_state(state: dict[str, dict[str, Tensor]], checkpoint: Path) -> None:
    """Masters and moments are the checkpoint's bits, the model's own weights their rounding."""
    shapes = {name: tuple(tensors["fp32"].shape) for name, tensors in state.items()}
    for slot in SLOTS:
        source = StackedExperts(PerExpert(ZeroCheckpointSource(checkpoint, slot)), shapes)  # type: ignore[arg-type]
        for name, tensors in state.items():
            assert torch.equal(tensors[slot].view(-1), source.read(name, 0, tensors[slot].numel())), (slot, name)
    for name, tensors in state.items():
        assert torch.equal(tensors["model"], tensors["fp32"].to(tensors["model"].dtype)), name


def assert_read_once(ranks: list[dict[str, Any]], checkpoint: Path, layout: Layout) -> None:
    """Each element of masters and moments by one rank alone, a chunk at a time, no more than its share, no padding."""
    for slot in SLOTS:
        source = ZeroCheckpointSource(checkpoint, slot)  # type: ignore[arg-type]
        for name in source.names():
            if name.endswith("e_score_correction_bias"):
                continue  # whole on every rank
            numel, end = math.prod(source.shape(name)), 0
            ranges = [[r[2:] for r in rank["reads"] if r[:2] == (slot, name)] for rank in ranks]
            for start, stop in sorted(r for of_rank in ranges for r in of_rank):
                assert start == end and stop - start <= CHUNK, (slot, name)
                end = stop
            assert end == numel, (slot, name)
            if layout.stage == 3 and layout.experts_per_shard == 2:  # as the source's: no shard is cut through
                share = max(sum(stop - start for start, stop in of_rank) for of_rank in ranges)
                holders = layout.world_size // (layout.ep if ".mlp.experts." in name else 1)
                assert share <= math.ceil(numel / holders)


def brief(value: Any) -> str:
    """A layout by what is not the default."""
    if not isinstance(value, Layout):
        return str(value)
    others = [f for f in fields(Layout)[4:] if getattr(value, f.name) != f.default]
    return " ".join([f"to {value.dp}x{value.sp}", *(f"{f.name}={getattr(value, f.name)}" for f in others)])


@pytest.mark.parametrize(
    ("source", "layout"),
    [
        ("2x2", Layout(dp=4, sp=1, accumulation=1, batch_size=1)),
        ("2x2", Layout(dp=1, sp=1, accumulation=1, batch_size=4, sub_group_size=2000)),
        ("2x2", Layout(dp=1, sp=2, accumulation=2, batch_size=2, experts_per_shard=4, **OFFLOAD)),
        ("2x2", Layout(dp=2, sp=1, accumulation=2, batch_size=1, stage=2)),
        ("2x2", Layout(dp=1, sp=1, accumulation=2, batch_size=2, stage=0)),
        ("2x2", Layout(dp=2, sp=2, accumulation=1, batch_size=2, ep=4)),
        ("4x1 ep 2", Layout(dp=1, sp=2, accumulation=4, batch_size=1)),
        ("4x1 ep 2", Layout(dp=2, sp=1, accumulation=1, batch_size=2, ep=2, experts_per_shard=1, **OFFLOAD)),
        ("4x1 ep 2", Layout(dp=1, sp=2, accumulation=2, batch_size=2, stage=2)),
        ("1x2 offloaded", Layout(dp=2, sp=2, accumulation=1, batch_size=2, ep=2)),
        ("1x2 offloaded", Layout(dp=2, sp=1, accumulation=1, batch_size=2, stage=1, experts_per_shard=1)),
        ("2x1 stage 1", Layout(dp=1, sp=2, accumulation=2, batch_size=2, ep=2)),
        ("1x2 stage 2", Layout(dp=2, sp=1, accumulation=2, batch_size=1, stage=1, offload_optimizer=True)),
        ("1x1 stage 0", Layout(dp=2, sp=1, accumulation=1, batch_size=2)),
    ],
    ids=brief,
)
def test_another_layout_goes_on_as_if_uninterrupted(
    source: str, layout: Layout, directory: str, whole: Any, checkpoint_of: Callable[[str], Path]
) -> None:
    expected = whole[0]
    assert max(expected[0]["norms"]) > RECIPE.gradient_clip_val  # so that clipping takes part
    ranks = run_distributed(resumed, layout.world_size, layout, RECIPE, directory, str(checkpoint_of(source)))
    assert rows_by_step(ranks, layout) == rows_by_step(expected, SOURCES["2x2"])[DONE:]
    for result in ranks:
        assert result["losses"] == pytest.approx(expected[0]["losses"][DONE:], rel=1e-5)
        assert result["rates"] == expected[0]["rates"][DONE:]
        assert result["draws"] == expected[0]["draws"][DONE:]
        assert result["metrics"]["val/loss"] == pytest.approx(expected[0]["metrics"]["val/loss"], rel=1e-5)
        for name, tensor in expected[0]["weights"].items():
            assert relative(result["weights"][name], tensor) < 1e-5, name
        assert_state(result["state"], checkpoint_of(source))
    assert_read_once(ranks, checkpoint_of(source), layout)


def test_the_same_layout_goes_on_bit_for_bit_from_each_ranks_own_file(directory: str, whole: Any) -> None:
    expected, checkpoint = whole
    ranks = run_distributed(resumed, 4, SOURCES["2x2"], RECIPE, directory, str(checkpoint))
    for rank, (result, uninterrupted) in enumerate(zip(ranks, expected, strict=True)):
        assert result["losses"] == uninterrupted["losses"][DONE:]
        assert result["sources"] == uninterrupted["sources"][DONE * SOURCES["2x2"].accumulation :]
        assert result["files"] == {rank}
        for name, tensor in uninterrupted["weights"].items():
            assert torch.equal(result["weights"][name], tensor), name
    assert_read_once(ranks, checkpoint, SOURCES["2x2"])


@pytest.mark.parametrize(
    ("before", "layout"),
    [
        (
            Layout(dp=1, sp=2, accumulation=2, batch_size=2),
            Layout(dp=2, sp=1, accumulation=1, batch_size=2, stage=1),
        ),
        (
            Layout(dp=2, sp=1, accumulation=1, batch_size=2, stage=1),
            Layout(dp=1, sp=2, accumulation=2, batch_size=2, experts_per_shard=4, **OFFLOAD),
        ),
    ],
    ids=brief,
)
def test_bf16_keeps_its_masters(before: Layout, layout: Layout, directory: str, tmp_path: Path) -> None:
    before, layout = (replace(value, precision="bf16-true") for value in (before, layout))
    recipe = replace(RECIPE, weight_rounding="nearest")  # stochastic: test_rounding.py
    expected = run_distributed(begun, 2, before, recipe, directory, str(tmp_path), False)[0]
    checkpoint = tmp_path / f"checkpoints/step={DONE}.ckpt"
    for result in run_distributed(resumed, 2, layout, recipe, directory, str(checkpoint)):
        assert_state(result["state"], checkpoint)
        assert any(not torch.equal(s["model"].float(), s["fp32"]) for s in result["state"].values())
        assert result["losses"] == pytest.approx(expected["losses"][DONE:], rel=1e-2)


def test_frozen_parameters_are_read_too(directory: str, tmp_path: Path) -> None:
    recipe = replace(RECIPE, freeze=("model.embed_tokens*", "*.q_a_layernorm.weight", "model.layers.1.mlp.experts.*"))
    before = Layout(dp=2, sp=1, accumulation=2, batch_size=1, ep=2)
    layout = Layout(dp=1, sp=1, accumulation=2, batch_size=2, experts_per_shard=4, stage=2)
    expected = run_distributed(begun, 2, before, recipe, directory, str(tmp_path), False)[0]
    checkpoint = tmp_path / f"checkpoints/step={DONE}.ckpt"
    (result,) = run_distributed(resumed, 1, layout, recipe, directory, str(checkpoint))
    assert result["losses"] == pytest.approx(expected["losses"][DONE:], rel=1e-5)
    for name, tensor in expected["weights"].items():
        assert relative(result["weights"][name], tensor) < 1e-5, name


ONE = Layout(dp=1, sp=1, accumulation=2, batch_size=2)


def test_a_lower_learning_rate_takes_effect(directory: str, whole: Any) -> None:
    expected, checkpoint = whole
    lower = replace(RECIPE, learning_rate=RECIPE.learning_rate / 4)
    (result,) = run_distributed(resumed, 1, ONE, lower, directory, str(checkpoint))
    assert result["rates"] == [[rate / 4 for rate in rates] for rates in expected[0]["rates"][DONE:]]


@pytest.mark.parametrize(
    ("layout", "recipe", "other_fields", "message"),
    [
        (
            replace(ONE, accumulation=1),
            RECIPE,
            {},
            r"takes 2 rows .*the checkpoint's took 4; set --trainer\.accumulate_grad_batches 2",
        ),
        (replace(ONE, packing=False), RECIPE, {}, r"data\.packing is False, but the checkpoint was trained with True"),
        (
            ONE,
            RECIPE,
            {"moe_intermediate_size": 16},
            r"(?s)tensors do not fit this model; config\.json in --model\.pretrained must be.*"
            r"shape of model\.layers\.1\.mlp\.experts\.0\.gate_proj\.weight",
        ),
        pytest.param(
            ONE,
            replace(RECIPE, mtp_loss_weight=0.0),
            {},
            r"(?s)--model\.mtp_loss_weight above 0 where it was.*unexpected: model\.layers\.3\.enorm\.weight",
            marks=pytest.mark.skipif(MtpModel is None, reason="the run was trained without MTP"),
        ),
        (
            ONE,
            replace(RECIPE, freeze=("lm_head*",)),
            {},
            r"(?s)1 tensor is trained here and not there \(missing\), or .*set --model\.freeze as it was:"
            r".*unexpected: lm_head\.weight",
        ),
    ],
    ids=["rows a step", "packing", "shape", "no MTP", "frozen"],
)
def test_what_is_not_the_same_run_is_refused_before_anything_is_read(
    layout: Layout,
    recipe: Recipe,
    other_fields: dict[str, Any],
    message: str,
    directory: str,
    whole: Any,
    tmp_path: Path,
) -> None:
    if other_fields:
        directory = save_model(oracle(FIELDS | other_fields), FIELDS | other_fields, tmp_path)
        config = Path(directory) / "config.json"
        config.write_text(config.read_text().replace('"num_nextn_predict_layers": 0', '"num_nextn_predict_layers": 1'))
    (result,) = run_distributed(resumed, 1, layout, recipe, directory, str(whole[1]))
    assert pytest.approx(0) == len(result["reads"])
    with pytest.raises(ValueError, match=message):
        raise ValueError(result["error"])


@pytest.mark.parametrize("harm", ["torn", "changed", "missing"])
def test_a_checkpoint_that_is_not_whole_is_refused_by_every_rank(
    harm: str, directory: str, whole: Any, tmp_path: Path
) -> None:
    shutil.copytree(whole[1], tmp_path / "harmed.ckpt")
    file = tmp_path / "harmed.ckpt/checkpoint/zero_pp_rank_3_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if harm != "missing":
        file.write_bytes(content[:-100] if harm == "torn" else content)
    layout = Layout(dp=1, sp=2, accumulation=2, batch_size=2)
    for result in run_distributed(resumed, 2, layout, RECIPE, directory, str(tmp_path / "harmed.ckpt")):
        assert file.name in result["error"] and not result["reads"]


def test_an_optimizer_on_nvme_is_refused() -> None:
    engine: Any = SimpleNamespace(zero_nvme_offload_optimizer=lambda: True)
    with pytest.raises(ValueError, match="offloaded to nvme cannot be resumed: offload it to cpu"):
        restore(engine, torch.nn.Module(), checkpoint=None)  # type: ignore[arg-type]
