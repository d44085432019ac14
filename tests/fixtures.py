"""Directories and checkpoints that tests of several folders read; made once per process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from src.weights.fp8 import is_quantised, quantise
from src.weights.side_files import copy_side_files
from tests.checkpoints.tiny import list_files, oracle, save_mtp, save_oracle, stored
from tests.checkpoints.workers import SETTINGS, Checkpoints, save_checkpoints
from tests.distributed.spawn import run_distributed
from tests.distributed.training import save_model
from tests.models.tiny import DEEPSEEK_V3
from tests.models.tiny import oracle as model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published directory in fp32, its MTP block included."""
    path = tmp_path_factory.mktemp("base")
    save_oracle(path, oracle())
    save_mtp(path, torch.float32)
    return path


@pytest.fixture(scope="session")
def fp8(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` as it would be published: FP8, its MTP block included."""
    directory = tmp_path_factory.mktemp("fp8")
    tensors = {}
    for name, tensor in stored(base).items():
        if is_quantised(name):
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensor)
        else:
            tensors[name] = tensor if name.endswith("bias") else tensor.bfloat16()
    save_file(tensors, directory / "model.safetensors")
    copy_side_files(base, directory)
    return directory


@pytest.fixture(scope="session")
def checkpoints(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Checkpoints of two processes after a step from `base`, one for each of SETTINGS."""
    folder = tmp_path_factory.mktemp("checkpoints")
    gathered = run_distributed(save_checkpoints, 2, base, folder, SETTINGS)[0]
    for label in SETTINGS:
        copy_side_files(base, folder / label / "hf")
        list_files(folder / label)
    return Checkpoints(folder, gathered)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face directory of transformers' model of DEEPSEEK_V3 with random weights, without MTP; only read."""
    return save_model(model(DEEPSEEK_V3), DEEPSEEK_V3, tmp_path_factory.mktemp("model"))
