"""What a checkpoint holds in addition to DeepSpeed's shards: the run's own files and a Hugging Face directory's."""

import shutil
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from src.checkpoints.safe_load import load_safely
from src.disk.json_file import read_object
from src.errors import UserError
from src.weights.side_files import copy_side_files

RUN_CONFIG = "config.yaml"
RUN_RECORD = "run.json"
_MODEL_FILES = ("config.json", "generation_config.json")


def write_run_files(
    directory: Path, files: dict[str, str], model_directory: str, tokenizer_directory: str | None
) -> None:
    """Writes `files` (path to text) into a checkpoint, and `hf/` with all that an export needs but the weights.

    The model's config and generation settings come from `model_directory`, all else from `tokenizer_directory`,
    unless `files` has it under `hf/`.
    """
    hf = directory / "hf"
    hf.mkdir()
    if tokenizer_directory is not None:
        copy_side_files(tokenizer_directory, hf, skip=_MODEL_FILES)
    for name in _MODEL_FILES:
        file = Path(model_directory) / name
        if file.is_file():
            shutil.copyfile(file, hf / name)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


def read_record(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's run.json; empty if there is none."""
    file = directory / RUN_RECORD
    return read_object(file) if file.is_file() else {}


def read_settings(directory: Path) -> dict[str, Any]:
    """The settings in a checkpoint's config.yaml; empty if there is none.

    Raises:
        UserError: it cannot be read, or does not have the form in which `fit` writes it.
    """
    file = directory / RUN_CONFIG
    remedy = "copy the checkpoint again"
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; {remedy}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}; {remedy}") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise UserError(f"{file} holds no settings but {str(settings)[:40]!r}; {remedy}")
    for name in ("model", "data", "trainer"):
        if not isinstance(settings.get(name), (dict, NoneType)):
            raise UserError(f"{file}: {name} is {str(settings[name])[:40]!r}, which must be a mapping; {remedy}")
    weight = (settings.get("model") or {}).get("mtp_loss_weight")
    if weight is not None and type(weight) not in (int, float):
        raise UserError(f"{file}: model.mtp_loss_weight is {str(weight)[:40]!r}, which must be a number; {remedy}")
    return settings


def client_state(directory: str | Path) -> dict[str, Any]:
    """What Lightning put into a DeepSpeed checkpoint, read without an engine; big tensors stay on disk.

    Raises:
        UserError: the directory is no such checkpoint, or holds what is not loaded for safety.
    """
    path = Path(directory)
    latest = path / "latest"
    folder = path / latest.read_text().strip() if latest.is_file() else path
    files = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    if not files:
        raise UserError(
            f"{path} is not a checkpoint: it has no model_states file; give a directory such as step=100.ckpt"
        )
    return load_safely(files[0])
