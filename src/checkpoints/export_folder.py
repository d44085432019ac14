"""The directory of an incomplete export, and who may write to it."""

import shutil
import time
from pathlib import Path
from typing import Any

from src.disk.durable import make_folder
from src.disk.json_file import read_object
from src.errors import UserError
from src.weights.file_size import parse_size
from src.weights.hf_writer import write_json

PLAN = ".export.json"
_LIVE = "the end of fit"  # the run's name in the plan of an export by `fit`
_PATIENCE = 120  # seconds to wait for the plan of the process that made the directory


def partial_of(out: Path) -> Path:
    """Where an export to `out` is written until it is complete."""
    return out.with_name(out.name + ".partial")


def check_target(out: Path, max_shard_size: str) -> None:
    """Checks up front, before training for example, that an export to `out` can be written.

    Raises:
        ValueError: `out` holds something, the command left an interrupted export to it, or the size is invalid.
    """
    parse_size(max_shard_size)
    _refuse_others(out)


def start_live(out: Path) -> None:
    """Makes a new directory for an export at the end of training, which never continues another one.

    Raises:
        ValueError: as `check_target`.
    """
    _refuse_others(out)
    partial = partial_of(out)
    if partial.exists():
        shutil.rmtree(partial)
    make_folder(partial)
    write_json(partial / PLAN, {"run": _LIVE, "plan": {"out": str(out)}})


def _found_plan(partial: Path) -> dict[str, Any]:
    plan = partial / PLAN
    return read_object(plan) if plan.is_file() else {}


def _refuse_others(out: Path) -> None:
    _refuse_present(out)
    partial = partial_of(out)
    if partial.exists() and _found_plan(partial).get("run") != _LIVE:
        raise UserError(f"{partial} is left over from an interrupted export: remove it, or give another directory")


def _refuse_present(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not empty: give another directory, or remove it")


def join(out: Path, plan: dict[str, Any], run: str, resume: bool) -> Path:
    """The directory to write to: made by this run's first process, or left by an interrupted run."""
    _refuse_present(out)
    partial = partial_of(out)
    plan_file = partial / PLAN
    make_folder(partial.parent)
    try:
        partial.mkdir()
    except FileExistsError:
        waited = time.monotonic() + _PATIENCE
        while not plan_file.is_file() and time.monotonic() < waited and not resume:
            time.sleep(0.1)
        existing = _found_plan(partial) or {"plan": plan}
        if existing.get("run") != run and not resume:
            raise UserError(
                f"{partial} is left over from an interrupted export: continue with --resume, or remove it"
            ) from None
        if existing["plan"] != plan:
            raise UserError(f"{partial} is an export of {existing['plan']}, not of {plan}: remove it") from None
        if existing.get("run") == run:
            return partial
    write_json(plan_file, {"run": run, "plan": plan})
    return partial
