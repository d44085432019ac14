"""The launcher without a scheduler, on one node and with a shell for pdsh: Ctrl-C saves, the same command goes on."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.cluster import ROOT


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    pdsh = tmp_path / "bin/pdsh"
    pdsh.parent.mkdir()
    pdsh.write_text('#!/bin/bash\nshift 5 # -S -R ssh -w NODE\nexec bash -c "$*"\n')
    pdsh.chmod(0o755)
    return os.environ | {
        "PATH": f"{pdsh.parent}:{os.environ['PATH']}",
        "NODES": "127.0.0.1",
        "GPUS_PER_NODE": "2",
        "CORES_PER_RANK": "1",
        "PREFLIGHT": "0",
        "DS_ACCELERATOR": "cpu",
    }


def start(environment: dict[str, str], root: Path, steps: int) -> subprocess.Popen[str]:
    overrides = ["--trainer.default_root_dir", str(root), "--trainer.max_steps", str(steps), "--data.max_length", "64"]
    command = ["bash", "scripts/pdsh/fit.sh", "configs/tiny_cpu.yaml", *overrides, "--trainer.limit_val_batches", "0"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_ctrl_c_saves_and_the_same_command_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    process = start(environment, tmp_path / "run", 300)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(120) == 130, "".join(seen) + rest
    assert "SIGUSR1: stopped after step" in rest
    (saved,) = (tmp_path / "run/checkpoints").glob("step=*.ckpt")
    done = int(saved.stem.removeprefix("step="))
    again = start(environment, tmp_path / "run", done + 1)
    printed = again.communicate(timeout=240)[0]
    assert again.returncode == 0, printed
    assert f"step {done + 1}/{done + 1}" in printed and f"step {done}/" not in printed
    assert (tmp_path / f"run/checkpoints/step={done + 1}.ckpt").exists()
