"""What every test runs under: one thread, no network; without CUDA, DeepSpeed on CPU and the `gpu` tests skipped."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # distributed tests start several processes on few cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# `shellcheck` stands beside this interpreter, on PATH or not.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if not CUDA and item.get_closest_marker("gpu"):
            item.add_marker(skip_gpu)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a small run takes: `model/` with config and tokenizer, `train.jsonl`, `val.jsonl` (small.py); only read."""
    from tests.small import save_inputs

    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder)
    return folder
