"""A run writes where it can, and alone."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from src.commands.config_command import ConfigCommand
from src.commands.run_lock import LOCK, lock_run
from src.commands.writable import check_writable, unwritable
from src.errors import UserError
from src.launcher import is_first_process
from src.strategies.zero_limits import STRATEGY
from tests.command import run

HOLD = (
    "import sys; from src.commands.run_lock import lock_run; lock_run(sys.argv[1]); print('held', flush=True); input()"
)


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
    message = f"another fit is training there .process {first.pid} on .* since 20.*Wait until it ends, stop it, or give"
    try:
        with pytest.raises(ValueError, match=message):
            lock_run(tmp_path)
        result = run("fit", "--config", "configs/tiny_cpu.yaml", f"--trainer.default_root_dir={tmp_path}", check=False)
        assert (
            result.returncode != 0 and f"trainer.default_root_dir {tmp_path}: another fit is training" in result.stderr
        )
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    lock_run(tmp_path)
    assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()


@pytest.mark.parametrize("there", ["folder", "fifo", "link to nowhere", "loop"])
def test_a_lock_file_that_cannot_be_written_is_named(there: str, tmp_path: Path) -> None:
    lock = tmp_path / LOCK
    match there:
        case "folder":
            lock.mkdir()
        case "fifo":
            os.mkfifo(lock)
        case _:
            lock.symlink_to(lock if there == "loop" else tmp_path / "nowhere" / "file")
    with pytest.raises(
        UserError, match=f"^trainer.default_root_dir {tmp_path}: its {LOCK} cannot be written: .*Remove"
    ):
        lock_run(tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_lock_file_that_is_anothers_or_on_a_full_disk_is_named(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / LOCK))

    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(UserError, match=f"{LOCK} cannot be written: {os.strerror(number)}"):
        lock_run(tmp_path)


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


class Parse(ConfigCommand):
    name = "parse"

    def run_command(self) -> None:
        """Nothing: `config` is there."""


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("trainer.default_root_dir", "--trainer.default_root_dir={}"),
        ("trainer.default_root_dir, checkpoints", "--trainer.default_root_dir={0.parent}"),
        ("trainer.default_root_dir, weights", "--trainer.default_root_dir={0.parent} --weights.every_n_train_steps=1"),
        ("data.cache_dir", "--data.cache_dir={}"),
        ("export.out", "--export.out={}"),
        ("stop.marker", "--stop.marker={}/marker"),
        *(
            (f"{STRATEGY}nvme_path", f"--{STRATEGY}nvme_path={{}} --{STRATEGY}{device}=nvme")
            for device in ("remote_device", "offload_optimizer_device", "offload_params_device")
        ),
        (
            "trainer.logger CSVLogger",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger --trainer.logger.save_dir={}",
        ),
    ],
)
def test_every_place_that_cannot_be_written_is_found(option: str, arguments: str, tmp_path: Path) -> None:
    where = tmp_path / (option.partition(", ")[2] or "file")
    where.write_text("in the way")
    root = f"--trainer.default_root_dir={tmp_path / 'run'}"
    config = Parse(["--config", "configs/tiny_cpu.yaml", root, *arguments.format(where).split()]).config
    found = unwritable(config)
    assert any(p.startswith(f"{option} ") for p in found) and all("bytes are free in" in p for p in found)
    assert "cannot be written: Not a directory, " in found[0] and "Give another place, or make room there." in found[0]
    assert not (tmp_path / "run").exists()


def test_the_default_cache_is_a_place_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    config = Parse(["--config", "configs/tiny_cpu.yaml", f"--trainer.default_root_dir={tmp_path / 'run'}"]).config
    (problem,) = unwritable(config)
    assert problem.startswith(f"data.cache_dir {tmp_path}/file/deepseek-sft: ")


def test_a_full_disk_says_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"--x {tmp_path}.*: No space left on device, [\d,]+ bytes are free in "):
        check_writable("--x", tmp_path / "made" / "later")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["fit", "plan", "preflight"])
def test_each_command_says_it(command: str, tmp_path: Path) -> None:
    args = ["--config", "configs/tiny_cpu.yaml", f"--trainer.default_root_dir={tmp_path}", "--model.from_scratch=true"]
    result = run(command, *args, "--export.out=/proc/run", check=False)  # nobody writes there, not root either
    assert "export.out /proc/run: /proc cannot be written: " in result.stdout + result.stderr
    assert (result.returncode == 0) == (command == "plan") and "Traceback" not in result.stderr


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    args = ["--config", "configs/tiny_cpu.yaml", f"--trainer.default_root_dir={tmp_path}", "--data.cache_dir=/proc/run"]
    for command in ("plan", "check-data"):
        result = run(command, *args, check=False)
        assert result.returncode and "/proc/run cannot be written to" in result.stderr, result.stderr
        assert "give another --data.cache_dir" in result.stderr and "Traceback" not in result.stderr
