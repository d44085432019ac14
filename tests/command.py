"""The commands as users run them, without the seconds of imports that each start costs.

`run` executes `python -m src.cli ...` in a process forked from spawn.py's server, which has imported everything: a
process of its own, with its arguments, environment, output and exit status. What has to start from nothing calls
`start_afresh`: once a command, so that its imports are tested too.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.distributed.spawn import free_port, rank_variables, server

ROOT = Path(__file__).parents[1]
Completed = subprocess.CompletedProcess[str]


def _execute(module: str, args: tuple[str, ...], environment: dict[str, str], folder: str) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_APPEND), descriptor)
    multiprocessing.set_start_method(None, force=True)  # the platform's own, not the one that this process came by
    gc.freeze()
    sys.argv = [module, *args]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # as at an interpreter's end, which forked processes skip


class Command:
    """A running `python -m MODULE ARGS` of one process, or of `ranks` as a launcher starts them."""

    def __init__(self, *args: str, ranks: int = 1, module: str = "src.cli", **environment: str) -> None:
        self.args = args
        self._folder = tempfile.TemporaryDirectory()
        for name in ("stdout", "stderr"):
            (Path(self._folder.name) / name).touch()
        port = free_port()
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            launched = rank_variables(rank, ranks, port) if ranks > 1 else {}
            variables = dict(os.environ) | launched | environment
            self.processes.append(server().Process(target=_execute, args=(module, args, variables, self._folder.name)))
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def output(self, name: str) -> str:
        return (Path(self._folder.name) / name).read_text()

    def wait(self) -> Completed:
        """Until all have ended, or one has failed: the others may wait for it."""
        try:
            while running := [process for process in self.processes if process.is_alive()]:
                wait([process.sentinel for process in running])
                if any(process.exitcode for process in self.processes):
                    for process in running:
                        process.join(5)
                    break
        finally:
            self.kill()
        codes = [process.exitcode or 0 for process in self.processes]
        return Completed(self.args, next(filter(None, codes), 0), self.output("stdout"), self.output("stderr"))


def run(*args: str, ranks: int = 1, check: bool = True, module: str = "src.cli", **environment: str) -> Completed:
    """Runs a command to its end; `check` fails the test where it fails."""
    return _checked(Command(*args, ranks=ranks, module=module, **environment).wait(), check)


def start_afresh(*args: str, check: bool = True) -> Completed:
    """The same by a new interpreter: about eight seconds of imports, for each process that the command starts."""
    command = [sys.executable, "-m", "src.cli", *args]
    return _checked(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600), check)


def _checked(result: Completed, check: bool) -> Completed:
    if check and result.returncode != 0:
        raise AssertionError(f"{result.args} failed:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
    return result
