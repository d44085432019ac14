"""All ranks go on from one checkpoint, whatever each of them has found."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from src.strategies import DeepSpeedSPStrategy, checkpointing

from .spawn import run_distributed


def agreed(found: list[str | None]) -> str:
    """The checkpoint that this rank goes on from, or the error."""
    checkpointing.NFS_PATIENCE = 0.6
    dist.init_process_group("gloo")
    strategy: Any = DeepSpeedSPStrategy()
    trainer = SimpleNamespace(ckpt_path=found[dist.get_rank()])
    strategy._lightning_module = SimpleNamespace(trainer=trainer)
    try:
        strategy.agree_on_checkpoint()
        return str(trainer.ckpt_path)
    except ValueError as error:
        return str(error)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def steps(tmp_path: Path) -> list[str]:
    for step in (2, 4):
        (tmp_path / f"step={step}.ckpt").mkdir()
        (tmp_path / f"step={step}.ckpt/manifest.json").write_text(json.dumps(step))
    return [str(tmp_path / f"step={step}.ckpt") for step in (2, 4)]


def test_rank_0s_choice_is_all_ranks(steps: list[str]) -> None:
    old, new = steps
    assert run_distributed(agreed, 2, [new, old]) == [new, new]
    assert run_distributed(agreed, 2, [old, old]) == [old, old]
    assert run_distributed(agreed, 2, [None, None]) == ["None", "None"]


def test_a_rank_that_sees_none_stops_all(steps: list[str]) -> None:
    for found, blind in (([None, steps[1]], 0), ([steps[1], None], 1)):
        first, second = run_distributed(agreed, 2, found)
        assert first == second and f"ranks [{blind}] see no checkpoint where others see {steps[1]}" in first


def elsewhere(found: list[str | None], mount: Path) -> str:
    """Rank 1 has another folder in the place of rank 0's."""
    digest = checkpointing._digest
    checkpointing._digest = lambda checkpoint, patience: digest(mount if dist.get_rank() else checkpoint, patience)
    return agreed(found)


@pytest.mark.parametrize("content", ["other", None])
def test_another_checkpoint_of_that_name_stops_all(steps: list[str], tmp_path: Path, content: str | None) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    if content is not None:
        (mount / "manifest.json").write_text(content)
    first, second = run_distributed(elsewhere, 2, [steps[1], steps[1]], mount)
    assert first == second and "is not the same checkpoint on all ranks: rank 0: manifest" in first
    assert ("no manifest" in first) is (content is None)


def unlisted(checkpoint: str) -> tuple[str, int]:
    """And how often this rank has waited."""
    waits, time = 0, checkpointing.time

    def sleep(seconds: float) -> None:
        nonlocal waits
        waits += 1

    checkpointing.time = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)  # type: ignore[assignment]
    return agreed([checkpoint, checkpoint]), waits


@pytest.mark.parametrize("in_its_place", ["nothing", "a folder", "a link to nowhere"])
def test_no_rank_waits_for_a_manifest_that_rank_0_does_not_see(steps: list[str], in_its_place: str) -> None:
    manifest = Path(steps[1]) / "manifest.json"
    manifest.unlink()
    if in_its_place == "a folder":
        manifest.mkdir()
    elif in_its_place == "a link to nowhere":
        manifest.symlink_to("nowhere")
    assert run_distributed(unlisted, 2, steps[1]) == [(steps[1], 0)] * 2
