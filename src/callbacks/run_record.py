"""What a checkpoint carries beside ZeRO's shards, so that it can be understood and exported alone."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

PACKAGES = ("torch", "deepspeed", "lightning", "transformers", "datasets", "flash-attn-4", "triton")


def _git_revision() -> str | None:
    """Of the code that runs, with "+changes" where the tree is not clean; None outside a checkout."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class RunRecord(pl.Callback):
    """Puts files into each checkpoint: config.yaml and run.json of the run, `hf/` with what an export needs.

    Args:
        config: the run's whole configuration, as YAML.
        model_directory: where the weights or the config.json came from.
        tokenizer_directory: where the tokenizer and its chat template came from; None where there is none.
    """

    def __init__(self, config: str, model_directory: str, tokenizer_directory: str | None) -> None:
        record = {
            "base": str(Path(model_directory).absolute()),
            "git_revision": _git_revision(),
            "versions": _versions(),
        }
        self.side_files = {
            "files": {"config.yaml": config, "run.json": json.dumps(record, indent=2)},
            "model_directory": model_directory,
            "tokenizer_directory": tokenizer_directory,
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The strategy writes them into the checkpoint's directory before it appears.
        checkpoint["side_files"] = self.side_files
