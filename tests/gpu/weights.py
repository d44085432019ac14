"""What the processes of test_weights.py run, one for each GPU: `torchrun -m tests.gpu.weights BASE FOLDER`."""

import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from src.strategies.live_partitions import LivePartitions
from tests.checkpoints.workers import SETTINGS, Setting, load_partitions, save_checkpoints


def through_the_device(self: LivePartitions, name: str, start: int, stop: int) -> torch.Tensor:
    """`LivePartitions.read` where a range is never this rank's own, as on many GPUs."""
    received = self._round(self._indices[name], start, stop)
    assert received is not None
    return received.view(self.dtype(name))


def main(base: Path, folder: Path) -> None:
    assert get_accelerator().device_name() == "cuda"
    for setting in (Setting(stage=3), Setting(stage=3, bf16=True, offload=True, mtp=True), Setting(stage=1, bf16=True)):
        wrong = load_partitions(base, setting)["wrong"]
        assert not wrong, (setting, wrong)
    LivePartitions.read = through_the_device  # type: ignore[method-assign]
    save_checkpoints(base, folder, SETTINGS)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
