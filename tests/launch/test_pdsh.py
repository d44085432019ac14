"""The launcher without a scheduler, on one node and with a shell for pdsh: Ctrl-C saves, the same command goes on."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.cluster import ROOT

# -S -R ssh -w NODE COMMAND; the node's shell is a plain one, and pdsh's own marks are replaced.
PDSH = """#!/bin/bash
node=$5
shift 5
command=$*
command=${command//%n/PDSH} command=${command//%h/$node} command=${command//%u/PDSH}
exec sh -c "$command"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    pdsh = tmp_path / "bin/pdsh"
    pdsh.parent.mkdir()
    pdsh.write_text(PDSH)
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


def test_arguments_and_paths_arrive_as_they_are(environment: dict[str, str], tmp_path: Path) -> None:
    """From a folder whose name has a space and a command in it, with a Python there, and pdsh's marks as arguments."""
    root = tmp_path / "a b $(touch ran) %n"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / "src").mkdir()
    (root / "src/cli.py").touch()
    (root / "my config.yaml").touch()
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$PWD" "$0" "$@" >"$SEEN.$$"\ngrep -s . /tmp/fit-*.pid\n')
    python.chmod(0o755)
    (tmp_path / "seen").mkdir()
    odd = ["--data.train_files=[/nfs/a b.jsonl]", "--x=%n%h%u", "--y=$(touch ran)", "--z=`touch ran`;'\"\\", "*"]
    variables = environment | {"NODES": "n0,n1", "SEEN": str(tmp_path / "seen/arguments"), "PREFLIGHT": "1"}
    command = ["bash", "scripts/pdsh/fit.sh", "my config.yaml", *odd]
    result = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    seen = sorted((tmp_path / "seen").iterdir())
    runs = [file.read_text().split("\0")[:-1] for file in seen]
    ranks = []
    for folder, interpreter, *arguments in runs:
        assert (folder, interpreter) == (str(root), str(python))
        start = arguments.index("src.cli")
        assert arguments[start + 2 :] == ["--config", "my config.yaml", "--ckpt_path", "auto", *odd]
        ranks.append((arguments[start + 1], next(word for word in arguments if word.startswith("--node_rank"))))
    assert sorted(ranks) == [(name, f"--node_rank={rank}") for name in ("fit", "preflight") for rank in (0, 1)]
    assert not [path for path in tmp_path.rglob("*") if path.name == "ran"]
    # Other runs of this machine have files there too: this run's hold the number of one of its processes.
    numbers = {file.suffix[1:] for file in seen}
    found = re.findall(r"^(/tmp/fit-[0-9a-f]{32}\.pid):(\d+)$", result.stdout, re.MULTILINE)
    pids = {Path(path) for path, number in found if number in numbers}
    assert len(pids) == 1 and not pids.pop().exists()
