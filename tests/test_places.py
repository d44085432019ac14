"""A run writes where it can, and alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from src.commands.places import LOCK, check_writable, is_first_process, lock_run
from tests.commands import run

HOLD = "import sys; from src.commands.places import lock_run; lock_run(sys.argv[1]); print('held', flush=True); input()"


def holder(root: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "3"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # started by Lightning from a shell in an allocation
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "5"}, False),
    ],
)
def test_who_is_first(variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first


def test_a_second_fit_in_a_folder_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    first = holder(tmp_path)
    message = f"another fit trains there .process {first.pid} on .* since 20.*Wait for its end, stop it, or give"
    try:
        with pytest.raises(ValueError, match=message):
            lock_run(tmp_path)
        result = run("fit", "--config", "configs/tiny_cpu.yaml", f"--trainer.default_root_dir={tmp_path}", check=False)
        assert result.returncode != 0 and f"trainer.default_root_dir {tmp_path}: another fit trains" in result.stderr
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    lock_run(tmp_path)
    assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()


def test_a_child_that_outlives_it_does_not_hold_the_lock(tmp_path: Path) -> None:
    fork = "import os, time; os.fork() or time.sleep(15);"
    script = HOLD.replace("print", f"{fork} print")
    first = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout is not None and first.stdout.readline() == b"held\n"
    first.kill()
    first.wait()
    lock_run(tmp_path)


@pytest.mark.parametrize("option", ["trainer.default_root_dir", "data.cache_dir", "export.out"])
def test_what_cannot_be_written_is_said_before_training(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(ValueError, match=f"{option} .*cannot be written: .*Give another place"):
            check_writable(option, place)
        result = run(
            *("fit", "--config", "configs/tiny_cpu.yaml", f"--trainer.default_root_dir={tmp_path / 'run'}"),
            *(f"--{option}={place}",),
            check=False,
        )
        assert result.returncode != 0 and f"{option} {place}: " in result.stderr
    check_writable(option, tmp_path / "made" / "later")
    assert not (tmp_path / "made").exists()
