"""DeepSpeed's operators, which PyTorch compiles on first use: one process of a machine at a time.

Each process that loads one holds PyTorch's lock file for that moment, compiled already or not, and one that is killed
then leaves the file: the next would wait for it for ever, silently. Here a lock of the kernel's comes first, which ends
with its process; a lock file that no process stands behind is then known to be left over, and is removed.
"""

import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from filelock import FileLock, Timeout
from torch.utils import cpp_extension

from src.errors import UserError

# Seconds that a lock file must be old in a folder of the user's choice, where another machine may build; no build is as
# long.
_OLD = 600.0


def prepare_builds() -> None:
    """Before DeepSpeed loads an operator: finds what compiles it, and guards every load of this process.

    Raises ValueError without a C++ compiler, and where another user made the folder: what lies in it would be run.
    """
    _find_tools()
    folder, ours = _build_folder()
    if getattr(cpp_extension.load, "one_process_at_a_time", False):
        return
    load = cpp_extension.load

    @functools.wraps(load)
    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        with _alone(folder / f"{name}.one_process", name):
            _remove_leftover(folder / name / "lock", 0.0 if ours else _OLD)
            if not (folder / name / f"{name}.so").exists():
                _say(f"building {name} in {folder}, about a minute")
            return load(name, *args, **kwargs)

    guarded.one_process_at_a_time = True  # type: ignore[attr-defined]
    cpp_extension.load = guarded


def import_muon() -> None:
    """Before an engine: DeepSpeed's Muon, which every engine imports, without the seconds that compiling it takes."""
    compiled, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compiled


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _build_folder() -> tuple[Path, bool]:
    """TORCH_EXTENSIONS_DIR, and whether it was made here: by default a temporary folder of this machine, user and
    environment. In a home that nodes share, a lock's process may be on any of them."""
    made_of = (sys.prefix, sys.version, *(version(name) for name in ("torch", "deepspeed")))
    name = f"torch_extensions_{platform.node()}_{os.getuid()}_{hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]}"
    own = Path(tempfile.gettempdir()) / name
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own)))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (folder == own and (own.is_symlink() or own.stat().st_uid != os.getuid())) or not os.access(folder, os.W_OK):
        raise UserError(f"{folder} belongs to another user; set TORCH_EXTENSIONS_DIR to a folder of your own")
    return folder.resolve(), folder == own


@contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    lock = FileLock(path, mode=0o666)
    try:
        lock.acquire(timeout=10)
    except Timeout:
        _say(f"waiting for another process that builds or loads {name} in {path.parent}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftover(lock: Path, old: float) -> None:
    """Waits while somebody stands behind it, then removes PyTorch's lock file."""
    said = False
    while lock.exists() and (_held(lock) or time.time() - lock.stat().st_mtime < old):
        if not said:
            killed = f", or was killed in it less than {old:.0f} s ago" if old else ""
            _say(f"waiting for {lock}: another program builds there{killed}")
            said = True
        time.sleep(0.5)
    lock.unlink(missing_ok=True)


def _held(lock: Path) -> bool:
    """By who has it open, or works in its folder: the compiler lives on when the process that called it is killed."""
    for process in psutil.process_iter(["open_files", "cwd"]):  # None of a process that we may not look into
        files = [file.path for file in process.info["open_files"] or ()]
        if process.info["cwd"] == str(lock.parent) or str(lock) in files:
            return True
    return False


def _find_tools() -> None:
    wanted = os.environ.get("CXX", "c++")
    compiler = next((name for name in (wanted, "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise UserError(
            f"no C++ compiler found ({wanted}, g++ or clang++): DeepSpeed builds operators on first use. "
            "Install one, e.g. `apt-get install g++` or `dnf install gcc-c++`."
        )
    os.environ["CXX"] = compiler  # PyTorch's builder asks for c++ where nothing is said
    # `ninja` stands beside the interpreter. With another version of it, every start would build anew.
    beside, path = str(Path(sys.executable).parent), os.environ.get("PATH", "").split(os.pathsep)
    if path[0] != beside:
        os.environ["PATH"] = os.pathsep.join([beside, *path])


if __name__ == "__main__":  # by scripts/setup.sh --gpu
    prepare_builds()
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load()
