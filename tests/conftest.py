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

pytest_plugins = ["tests.fixtures"]

CUDA = torch.cuda.is_available()
# Fixtures that train, or start a cluster: tests that share one stay on one worker of pytest-xdist, which makes it once.
SHARED = ("trained", "whole", "checkpoints", "cluster")
# Files of long tests, which come first: short ones at the end leave no worker alone for long.
LONG = ("/test_node_scaling.py", "/launch/", "/distributed/", "/rehearsal/", "/test_guide.py")
if not CUDA:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's, which looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(part in str(item.path) for part in LONG))
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if not CUDA and item.get_closest_marker("gpu"):
            item.add_marker(skip_gpu)
        for name in getattr(item, "fixturenames", ()):
            if name in SHARED:
                item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a small run takes: `model/` with config and tokenizer, `train.jsonl`, `val.jsonl` (small.py)."""
    from tests.small import save_inputs

    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder)
    return folder
