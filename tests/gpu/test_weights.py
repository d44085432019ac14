"""Weights into and out of models on CUDA devices: ZeRO-3 partitions on the device and offloaded, NCCL's rounds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.commands.export import export
from src.weights.side_files import copy_side_files
from tests.checkpoints.tiny import list_files, oracle, save_mtp, save_oracle
from tests.checkpoints.workers import DTYPES, SETTINGS, live_export

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def test_weights_in_and_out(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "checkpoints"
    save_oracle(base, oracle())
    save_mtp(base, torch.float32)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torch.cuda.device_count()}"]
    command = [sys.executable, *launch, "-m", "tests.gpu.weights", str(base), str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-6000:]
    for label in SETTINGS:
        copy_side_files(base, folder / label / "hf")
        list_files(folder / label)
        for dtype in DTYPES:
            out = folder / "exported" / label / dtype  # a label may end like another with a dtype
            export(str(folder / label), str(out), dtype, max_shard_size="100KB")
            live = live_export(folder, label, dtype)
            assert {file.name for file in live.iterdir()} == {file.name for file in out.iterdir()}
            for file in out.iterdir():
                assert file.read_bytes() == (live / file.name).read_bytes(), (label, dtype, file.name)
