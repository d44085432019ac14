"""DeepSpeed's operators need a C++ compiler, and are built by one process at a time, whatever was killed before."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder
from torch.utils import cpp_extension

from src.strategies import operators
from tests.launch.cluster import ROOT

LOAD = """
import runpy, sys
runpy.run_path("src/strategies/operators.py")["prepare_builds"]()  # without all that the folder imports
from torch.utils import cpp_extension
cpp_extension.load("tiny", [sys.argv[1]], is_python_module=False)
"""


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for builds of this test alone; what `prepare_builds` changes in this process is put back."""
    monkeypatch.setattr(cpp_extension, "load", getattr(cpp_extension.load, "__wrapped__", cpp_extension.load))
    for name in ("CXX", "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return operators._build_folder()[0]


@pytest.mark.parametrize("present", [[], ["clang++"], ["c++", "g++"]])
def test_the_compiler_is_found_or_named(present: list[str], restored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in present else None)
    if not present:
        with pytest.raises(ValueError, match="no C\\+\\+ compiler found .*apt-get install g"):
            operators.prepare_builds()
    else:
        operators.prepare_builds()
        assert os.environ["CXX"] == present[0]


def test_a_build_is_waited_for_and_a_killed_one_is_not(restored: Path) -> None:
    source, slow = restored.parent / "tiny.cpp", restored.parent / "slow"
    source.write_text("int tiny() { return 1; }\n")
    slow.write_text('#!/bin/bash\n[[ " $* " != *" -c "* ]] || sleep 600\nexec c++ "$@"\n')
    slow.chmod(0o755)
    command = [sys.executable, "-c", LOAD, str(source)]
    first = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"CXX": str(slow)})
    lock = restored / "tiny/lock"
    _until(lock.exists)
    assert operators._held(lock)
    said = restored.parent / "said"
    with said.open("w") as stderr:
        second = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"CXX": "c++"}, stderr=stderr)
    _until(lambda: "waiting for another process that builds or loads tiny" in said.read_text())
    first.kill()  # its compiler lives on
    first.wait()
    _until(lambda: f"waiting for {lock}: another program builds there" in said.read_text())
    assert second.poll() is None
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(lock.parent):  # ninja, and what it runs in a process group of its own
            process.kill()
    assert second.wait(120) == 0 and "building tiny in" in said.read_text()
    assert (restored / "tiny/tiny.so").exists() and not lock.exists()


def test_in_a_folder_of_the_users_a_lock_may_be_of_another_machine(restored: Path) -> None:
    lock = restored / "lock"
    lock.touch()
    begun = time.monotonic()
    operators._remove_leftover(lock, 1.0)
    assert not lock.exists() and time.monotonic() - begun > 0.5


def test_deepspeed_loads_through_it(restored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(cpp_extension, "load", lambda name, **_: loaded.append(name))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    operators.prepare_builds()
    ShareMemCommBuilder().load()
    assert loaded == ["deepspeed_shm_comm"] and (restored / "deepspeed_shm_comm.one_process").exists()


def test_a_lock_that_another_program_holds_stays(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w"):
        assert operators._held(lock)
    assert not operators._held(lock)


def test_another_users_folder_is_refused(restored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(
        ValueError, match="torch_extensions_.*_12345_.* belongs to another user; set TORCH_EXTENSIONS_DIR"
    ):
        operators.prepare_builds()


def _until(condition: Callable[[], bool], seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)
