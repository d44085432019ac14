"""DeepSpeed's operators, which PyTorch compiles on first use: one process of a machine at a time.

Each process that loads one holds PyTorch's lock file for that moment, compiled already or not, and one that is killed
then leaves the file: the next would wait for it for ever, silently. Here a lock of the kernel's comes first, which ends
with its process; a lock file that no process holds open is then known to be left over, and is removed.
"""

import functools
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from filelock import FileLock
from torch.utils import cpp_extension


def prepare_builds() -> None:
    """Before DeepSpeed loads an operator: finds what compiles it, and guards every load of this process.

    Raises ValueError without a C++ compiler, and where another user made the folder: what lies in it would be run.
    """
    _find_tools()
    folder = _build_folder()
    if hasattr(cpp_extension.load, "__wrapped__"):
        return
    load = cpp_extension.load

    @functools.wraps(load)
    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        with FileLock(folder / f"{name}.one_process"):
            lock = folder / name / "lock"
            if lock.exists() and not _held(lock):
                lock.unlink()
            if not (folder / name / f"{name}.so").exists():
                print(f"building {name} in {folder}, about a minute", file=sys.stderr, flush=True)
            return load(name, *args, **kwargs)

    cpp_extension.load = guarded


def _build_folder() -> Path:
    """TORCH_EXTENSIONS_DIR, set here where it is not: a folder on the machine's own disk for this user and this
    environment. In a home that nodes share, a lock's process may be on any of them."""
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    own = Path(tempfile.gettempdir()) / f"torch_extensions_{os.getuid()}_{environment}"
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own)))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder == own and own.stat().st_uid != os.getuid():
        raise ValueError(f"{own} belongs to another user; set TORCH_EXTENSIONS_DIR to a folder of your own")
    return folder.resolve()


def _held(lock: Path) -> bool:
    found = psutil.process_iter(["open_files"])  # None of a process that we may not look into
    return any(file.path == str(lock) for process in found for file in process.info["open_files"] or ())


def _find_tools() -> None:
    wanted = os.environ.get("CXX", "c++")
    compiler = next((name for name in (wanted, "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise ValueError(
            f"no C++ compiler found ({wanted}, g++ or clang++): DeepSpeed builds operators on first use. "
            "Install one, e.g. `apt-get install g++` or `dnf install gcc-c++`."
        )
    os.environ["CXX"] = compiler  # PyTorch's builder asks for c++ where nothing is said
    # `ninja` stands beside the interpreter. With another version of it, every start would build anew.
    beside, path = str(Path(sys.executable).parent), os.environ.get("PATH", "").split(os.pathsep)
    if path[0] != beside:
        os.environ["PATH"] = os.pathsep.join([beside, *path])
