"""The export at the end of `fit`: what the checkpoint of the last step exports, on any layout; and when it fails."""

from pathlib import Path
from typing import Any

import pytest
import torch

from src.callbacks.export_at_end import ExportAtEnd
from src.callbacks.run_record import RunRecord
from src.callbacks.step_checkpoint import StepCheckpoint
from src.checkpoints.export_folder import check_target, start_live
from src.commands.export import export
from src.weights.output import Dtype
from tests.models.tiny import DEEPSEEK_V3, mtp_oracle, needs_mtp_oracle, oracle

from .spawn import run_distributed
from .training import Layout, Recipe, fit, save_model

SIZE = "20KB"


def fit_and_export(layout: Layout, recipe: Recipe, directory: str, root: str, dtypes: tuple[Dtype, ...]) -> None:
    callbacks = (
        StepCheckpoint(every_n_train_steps=0),
        RunRecord("model: {from_scratch: false}", directory, None),
        *(ExportAtEnd(f"{root}/live {dtype}", dtype, SIZE) for dtype in dtypes),
    )
    fit(layout, recipe, directory, 30, root, more_callbacks=callbacks)


@needs_mtp_oracle
@pytest.mark.parametrize(
    ("layout", "mtp_loss_weight", "dtypes"),
    [
        (Layout(dp=2, sp=2, accumulation=1, batch_size=2, precision="bf16-true"), 0.0, ("bf16", "fp8")),
        (
            Layout(dp=1, sp=2, accumulation=2, batch_size=1, stage=1, precision="bf16-true"),
            0.3,
            ("bf16", "fp8", "fp32"),
        ),
        (Layout(dp=1, sp=1, accumulation=1, batch_size=2), 0.3, ("bf16", "fp32")),
        (Layout(dp=4, sp=1, accumulation=1, batch_size=1, precision="bf16-true", ep=2), 0.3, ("fp8",)),
    ],
    ids=[
        "stage 3, 4 processes, SP, the base's MTP block",
        "stage 1, 2 processes, SP, MTP",
        "stage 3, alone, MTP",
        "stage 3, 4 processes, EP, MTP",
    ],
)
def test_it_writes_what_the_checkpoint_exports(
    layout: Layout, mtp_loss_weight: float, dtypes: tuple[Dtype, ...], tmp_path: Path
) -> None:
    main = oracle(DEEPSEEK_V3)
    directory = save_model(main, DEEPSEEK_V3, tmp_path / "model", mtp_oracle(main))
    recipe = Recipe(mtp_loss_weight=mtp_loss_weight, steps=2)
    run_distributed(fit_and_export, layout.world_size, layout, recipe, directory, str(tmp_path), dtypes)
    for dtype in dtypes:
        export(str(tmp_path / "checkpoints/last.ckpt"), str(tmp_path / dtype), dtype, SIZE)
        live, expected = (
            {file.name: file.read_bytes() for file in folder.iterdir()}
            for folder in (tmp_path / f"live {dtype}", tmp_path / dtype)
        )
        assert live.keys() == expected.keys() and len(live) > 2 * layout.world_size
        assert [name for name in live if live[name] != expected[name]] == []


def fail_on_rank_1(directory: str, root: str) -> str:
    from src.checkpoints import export as module

    real = module.write_shard

    def write(folder: Path, shard: Any, progress: Any) -> None:
        if torch.distributed.get_rank() == 1:
            raise OSError("no space left")
        real(folder, shard, progress)

    module.write_shard = write  # type: ignore[assignment]
    layout = Layout(dp=2, sp=1, accumulation=1, batch_size=1)
    try:
        fit_and_export(layout, Recipe(mtp_loss_weight=0, steps=1), directory, root, ("bf16",))
    except (OSError, RuntimeError) as error:
        return repr(error)
    return ""


def test_a_rank_that_fails_ends_the_others_and_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    directory = save_model(oracle(DEEPSEEK_V3), DEEPSEEK_V3, tmp_path / "model")
    errors = run_distributed(fail_on_rank_1, 2, directory, str(tmp_path))
    assert "rank 1 failed while the weights were exported" in errors[0] and "no space left" in errors[1]
    left, out = tmp_path / "live bf16.partial", tmp_path / "live bf16"
    assert left.exists() and not out.exists()
    check_target(out, SIZE)  # a requeued job is not refused
    (left / "model-00009-of-00009.safetensors").touch()
    start_live(out)
    assert [file.name for file in left.iterdir()] == [".export.json"]


def refused(directory: str, root: str, size: str) -> str:
    layout = Layout(dp=1, sp=1, accumulation=1, batch_size=1)
    try:
        fit(layout, Recipe(steps=1), directory, 30, root, more_callbacks=(ExportAtEnd(f"{root}/out", "bf16", size),))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("present", "size", "message"),
    [
        ("out", "5GB", "out already exists and is not empty: give another directory"),
        ("out.partial", "5GB", "out.partial is left over from an interrupted export: remove it"),
        ("other", "five", "max_shard_size 'five' is not a size"),
        ("other", "5GB", "ExportAtEnd needs the callback RunRecord"),
    ],
)
def test_what_cannot_be_written_is_refused_before_training(
    present: str, size: str, message: str, tmp_path: Path
) -> None:
    directory = save_model(oracle(DEEPSEEK_V3), DEEPSEEK_V3, tmp_path / "model")
    (tmp_path / present).mkdir()
    (tmp_path / present / "file").touch()
    weights = Path(directory) / "model.safetensors"
    weights.unlink()  # which training would come to read
    (error,) = run_distributed(refused, 1, directory, str(tmp_path), size)
    assert message in error
