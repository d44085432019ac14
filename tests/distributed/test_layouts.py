"""The same tokens weigh the same on any layout: losses, gradients and weights equal plain PyTorch with transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import DEEPSEEK_V3, KIMI_K2, MtpModel, mtp_oracle, oracle, oracle_tensors, relative

from .spawn import run_distributed
from .training import Layout, Recipe, fit, plain_pytorch, save_model

ROWS_PER_STEP = 4
DOCUMENTS = 60  # 18 rows: the fifth step gets two, and is filled up with empty ones
# Weight decay, clipping, MTP, balance loss and moving router biases all on; MTP where transformers has the oracle.
RECIPE = Recipe(mtp_loss_weight=0.3 if MtpModel is not None else 0.0)


def block_over(model: Any) -> Any:
    return mtp_oracle(model) if MtpModel is not None else None


LAYOUTS = [
    Layout(dp=1, sp=1, accumulation=2, batch_size=2),
    Layout(dp=1, sp=1, accumulation=1, batch_size=4, packing=False),
    Layout(dp=2, sp=1, accumulation=1, batch_size=2),
    Layout(dp=2, sp=1, accumulation=2, batch_size=1, packing=False),
    Layout(dp=1, sp=2, accumulation=4, batch_size=1, attention_output="keep"),
    Layout(dp=1, sp=2, accumulation=2, batch_size=2, packing=False),
    Layout(dp=1, sp=4, accumulation=1, batch_size=4),
    Layout(dp=1, sp=4, accumulation=4, batch_size=1, packing=False),
    Layout(dp=2, sp=2, accumulation=2, batch_size=1, attention_output="offload"),
    Layout(dp=4, sp=1, accumulation=1, batch_size=1),
    # Experts over ranks: SP groups that are EP groups, in them, around them, and none.
    Layout(dp=1, sp=2, accumulation=2, batch_size=2, ep=2),
    Layout(dp=2, sp=1, accumulation=1, batch_size=2, ep=2, activation_checkpointing=False),
    Layout(dp=2, sp=2, accumulation=2, batch_size=1, ep=4, attention_output="keep"),
    Layout(dp=1, sp=4, accumulation=2, batch_size=2, ep=2, experts_per_shard=4, packing=False),
    Layout(dp=4, sp=1, accumulation=1, batch_size=1, ep=2, experts_per_shard=1, sub_group_size=2000),
    Layout(dp=2, sp=1, accumulation=2, batch_size=1, ep=2, offload_optimizer=True, offload_parameters=True),
    # The other stages, and states on the host (DeepSpeed's own CPU Adam).
    Layout(dp=2, sp=1, accumulation=2, batch_size=1, stage=0),
    Layout(dp=1, sp=2, accumulation=2, batch_size=2, stage=1),
    Layout(dp=2, sp=1, accumulation=2, batch_size=1, stage=2),
    Layout(dp=1, sp=2, accumulation=2, batch_size=2, offload_optimizer=True, offload_parameters=True),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = oracle(DEEPSEEK_V3)
    return save_model(model, DEEPSEEK_V3, tmp_path_factory.mktemp("model"), block_over(model))


@pytest.fixture(scope="module")
def references() -> dict[bool, dict[str, Any]]:
    """The run in plain PyTorch, with packing's rows and without: other rows stand in a step."""
    runs = {}
    for packing in (True, False):
        model = oracle(DEEPSEEK_V3)
        runs[packing] = plain_pytorch(model, block_over(model), RECIPE, DOCUMENTS, ROWS_PER_STEP, packing)
    return runs


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_is_the_same_training(
    layout: Layout, directory: str, references: dict[bool, dict[str, Any]]
) -> None:
    expected = references[layout.packing]
    assert max(expected["norms"]) > RECIPE.gradient_clip_val  # so that clipping takes part
    for result in run_distributed(fit, layout.world_size, layout, RECIPE, directory, DOCUMENTS):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        for name, value in expected["metrics"].items():
            if not layout.packing and name.startswith("val/"):
                continue  # five steps are a part of that epoch, and validation stands at its end
            assert result["metrics"][name] == pytest.approx(value, rel=1e-5), name
        if layout.stage > 0:  # DeepSpeed reports none without partitions
            assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for kind in ("gradients", "weights"):
            assert result[kind].keys() == expected[kind].keys()
            for name, tensor in expected[kind].items():
                assert relative(result[kind][name], tensor) < 1e-5, (kind, name)


def assert_two_steps(model: Any, fields: dict[str, Any], layout: Layout, folder: Path) -> dict[str, Any]:
    """Two steps from `model` are those of plain PyTorch, which are returned."""
    directory, recipe = save_model(model, fields, folder), Recipe(steps=2)
    expected = plain_pytorch(model, None, recipe, DOCUMENTS, layout.dp * layout.batch_size * layout.accumulation)
    for result in run_distributed(fit, layout.world_size, layout, recipe, directory, DOCUMENTS):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        # AdamW makes whole steps of a gradient of rounding errors: one bias is 8e-5 off on any layout.
        for kind, tolerance in (("gradients", 1e-5), ("weights", 2e-4)):
            for name, tensor in expected[kind].items():
                assert relative(result[kind][name], tensor) < tolerance, (kind, name)
    return expected


@pytest.mark.parametrize("ep", [2, 4])
def test_all_tokens_may_go_to_a_part_of_the_ranks(ep: int, tmp_path: Path) -> None:
    """Of two to the first; of four to two of them, which is more than they receive at once."""
    model = oracle(DEEPSEEK_V3)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias[:4] += 4.0  # groups 0 and 1, the first rank's
    layout = Layout(dp=ep, sp=1, accumulation=4 // ep, batch_size=1, ep=ep, experts_per_shard=1)
    expected = assert_two_steps(model, DEEPSEEK_V3, layout, tmp_path)
    assert not expected["gradients"]["model.layers.1.mlp.experts.down_proj"][4:].any()


def test_a_row_may_be_split_over_two_groups_of_experts(tmp_path: Path) -> None:
    """Ranks 2 and 3 share a row; the experts are shared by ranks 0 to 2 and 3 to 5."""
    layout = Layout(dp=3, sp=2, accumulation=1, batch_size=1, ep=3)
    assert_two_steps(oracle(KIMI_K2), KIMI_K2, layout, tmp_path)


@pytest.mark.parametrize("ep", [1, 2])
def test_bf16_stays_within_a_percent_of_fp32(ep: int, directory: str, references: dict[bool, dict[str, Any]]) -> None:
    layout = Layout(dp=1, sp=2, accumulation=2, batch_size=2, precision="bf16-true", ep=ep)
    model = oracle(DEEPSEEK_V3)
    start = oracle_tensors(model, block_over(model))
    for result in run_distributed(fit, 2, layout, RECIPE, directory, DOCUMENTS):
        assert result["losses"] == pytest.approx(references[True]["losses"], rel=1e-2)
        # The routers' biases are fp32 whatever the model is: steps of 0.02 would not survive bf16 as they are.
        for name, bias in result["weights"].items():
            if name.endswith("e_score_correction_bias"):
                moved = (bias - start[name]) / RECIPE.router_bias_update_speed
                torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_gradients_are_reduced_and_accumulated_in_fp32(stage: int, directory: str) -> None:
    """Each row is a micro-step, the same to the bit on either layout: but for fp32 sums the gradients are too."""
    recipe, layouts = Recipe(steps=1, mtp_loss_weight=0.0), [Layout(1, 1, 16, 1), Layout(2, 1, 8, 1)]
    layouts = [replace(layout, precision="bf16-true", stage=stage) for layout in layouts]
    one, two = (run_distributed(fit, layout.dp, layout, recipe, directory, DOCUMENTS) for layout in layouts)
    for name, gradient in one[0]["gradients"].items():
        assert relative(two[0]["gradients"][name], gradient) < 1e-5, name


@pytest.mark.parametrize(
    "layout",
    [
        Layout(4, 1, 1, 1, node=2),
        Layout(4, 1, 1, 1, node=2, ep=2, offload_optimizer=True, offload_parameters=True),
    ],
    ids=str,
)
def test_gradients_sent_in_bf16_train_as_those_in_fp32(layout: Layout, directory: str) -> None:
    """Nodes of two: with ep 2 each has one rank of an expert, and only the order of sums differs."""
    recipe, layout = Recipe(steps=3, mtp_loss_weight=0.0), replace(layout, precision="bf16-true")
    fp32, bf16 = (
        run_distributed(fit, 4, replace(layout, reduce_dtype=dtype), recipe, directory, DOCUMENTS)[0]
        for dtype in ("fp32", "bf16")
    )
    bound = 2.0**-8 if layout.ep == 1 else 1e-6  # half a unit of bf16's last place, once per node
    off = {name: relative(bf16["gradients"][name], tensor) for name, tensor in fp32["gradients"].items()}
    experts = {name for name in off if ".mlp.experts." in name}
    assert experts and all(off[name] < (bound if name in experts else 1e-6) for name in off), off
    assert layout.ep > 1 or all(off[name] > 1e-5 for name in experts)  # it was sent in bf16
    assert bf16["losses"] == pytest.approx(fp32["losses"], rel=1e-2)  # bf16's own noise, as above
    assert bf16["norms"][0] == pytest.approx(fp32["norms"][0], rel=2.0**-8)
    for name, tensor in fp32["weights"].items():
        assert relative(bf16["weights"][name], tensor) < 1e-2, name


def test_two_runs_on_one_layout_are_bit_equal(directory: str) -> None:
    layout = Layout(dp=1, sp=2, accumulation=2, batch_size=2, ep=2)
    (first, _), (second, _) = (run_distributed(fit, 2, layout, RECIPE, directory, DOCUMENTS) for _ in range(2))
    assert first["losses"] == second["losses"]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])


def test_sizes_that_do_not_divide_are_refused(directory: str) -> None:
    three = Layout(dp=1, sp=3, accumulation=1, batch_size=1)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="num_attention_heads 4 is not a multiple"):
        run_distributed(fit, 3, three, RECIPE, directory, DOCUMENTS)
    alone = Layout(dp=1, sp=1, accumulation=1, batch_size=1, ep=2)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="expert_parallel_size 2 must divide the 1"):
        run_distributed(fit, 1, alone, RECIPE, directory, DOCUMENTS)
