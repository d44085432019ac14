"""What is checked of a config before any GPU time is spent; each error names the value, the limit and the remedy."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from src.callbacks.step_checkpoint import LAST, checkpoint_folder, step_of
from src.commands.mtp_weight import has_weights
from src.datamodules import SFTDataModule
from src.errors import UserError
from src.models.deepseek_v3.config_json import read_fields
from src.strategies.parallel_dims import ParallelDims
from src.weights.safetensors_files import stored_dtypes


def parallel_dims(trainer: Namespace) -> ParallelDims | None:
    """The sizes of DP and SP; None if only the cluster knows the number of devices (auto, -1).

    Raises:
        ValueError: sizes do not divide.
    """
    devices = len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices
    if not str(devices).isdecimal():
        return None
    options = trainer.strategy.get("init_args") if isinstance(trainer.strategy, Namespace) else None
    sp, ep = ((options or {}).get(f"{kind}_parallel_size", 1) for kind in ("sequence", "expert"))
    return ParallelDims(trainer.num_nodes * int(devices), sp, ep=ep, per_node=int(devices))


def check_experts_divide(trainer: Namespace, experts: int) -> None:
    """Raises ValueError where expert_parallel_size does not suit a layer's experts and, if known, the processes."""
    if (dims := parallel_dims(trainer)) is not None:
        dims.check_experts(experts)


def check_data_fits_model(data: SFTDataModule, config: Any, pretrained: str) -> None:
    assert data.tokenizer is not None
    limit, length = config.max_position_embeddings, data.options.max_length
    if length > limit:
        raise UserError(
            f"data.max_length {length} is above the model's max_position_embeddings {limit} "
            f"({pretrained}/config.json); lower it."
        )
    if len(data.tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer {data.tokenizer.name_or_path} has {len(data.tokenizer)} tokens, the model a vocab_size of "
            f"{config.vocab_size}: they do not belong together."
        )


def find_checkpoint(path: str, root: str) -> Path:
    # A run killed right after writing a checkpoint leaves the link at the previous one.
    checkpoint = (newest_checkpoint(root) or checkpoint_folder(root) / LAST) if path == "last" else Path(path)
    if not checkpoint.is_dir():
        raise UserError(
            f"--ckpt_path {path}: there is no checkpoint {checkpoint}. "
            "Leave --ckpt_path out to start a new run, or set trainer.default_root_dir to the run's folder."
        )
    return checkpoint.resolve()


def check_weights(directory: str) -> None:
    if not Path(directory).is_dir():
        read_fields(directory, "--model.pretrained")  # refuses it
    if not has_weights(directory):
        raise UserError(
            f"{directory} holds no weights (*.safetensors): give the model's directory with --model.pretrained, "
            "or --model.from_scratch true for random ones."
        )


def rounded_to_bf16(directory: str) -> str | None:
    """The dtype of a directory's weights if bf16 rounds them: FP8 (fp32 scales) or FP32; else None."""
    matrices = {dtype for name, dtype in stored_dtypes(directory).items() if name.endswith("proj.weight")}
    if torch.float8_e4m3fn in matrices:
        return "FP8"
    return "FP32" if torch.float32 in matrices else None


def newest_checkpoint(root: str) -> Path | None:
    checkpoints = [p for p in checkpoint_folder(root).glob("step=*.ckpt") if step_of(p) >= 0]
    return max(checkpoints, key=step_of, default=None)


def refuse_older(checkpoint: Path, root: str) -> None:
    newest = newest_checkpoint(root)
    if newest is None:
        return
    if checkpoint.parent != newest.parent.resolve():
        raise UserError(
            f"--ckpt_path {checkpoint} belongs to another run, and {newest.parent} already holds checkpoints, the "
            f"newest {newest.name}. Give another --trainer.default_root_dir, or --ckpt_path last to continue the "
            "existing run."
        )
    if step_of(checkpoint) < step_of(newest):
        raise UserError(
            f"--ckpt_path {checkpoint} is older than {newest.name} beside it, which the run would overwrite. "
            "Move the newer ones away, or give --ckpt_path last."
        )


def refuse_other_run(root: str) -> None:
    newest = newest_checkpoint(root)
    if newest is not None:
        raise UserError(
            f"{newest.parent} holds checkpoints of an earlier run, the newest {newest.name}. "
            "Give --ckpt_path last to continue it, another --trainer.default_root_dir to start a new one, "
            "or remove the folder."
        )
