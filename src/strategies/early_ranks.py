"""The other ranks of this machine import beside the first one, and wait for the word that it trains.

Lightning starts them when the first has imported, tokenised and built everything, and then waits for their imports.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

PIPE = "DEEPSEEK_SFT_PIPE"  # the descriptor that a waiting process reads
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_JOB_ID", "LSB_JOBID", "KUBERNETES_PORT", "OMPI_COMM_WORLD_RANK")
Process = subprocess.Popen[bytes]

_waiting: list[tuple[Process, int]] = []  # with the end of its pipe to write to


def start(module: str, args: Sequence[str], devices: int) -> None:
    """Starts `python -m MODULE ARGS` for the local ranks 1 to devices - 1, unless a launcher does; each is to call
    `wait` when it has imported. They end with this process, if it ends before it trains."""
    if PIPE in os.environ or any(name in os.environ for name in LAUNCHED):
        return
    for rank in range(1, devices):
        reading, writing = os.pipe()
        environment = os.environ | {
            PIPE: str(reading),
            "LOCAL_RANK": str(rank),
        }  # libraries look while they are imported
        process = subprocess.Popen([sys.executable, "-m", module, *args], env=environment, pass_fds=(reading,))
        os.close(reading)
        _waiting.append((process, writing))
    atexit.register(_end)


def wait() -> None:
    """In a process of `start`: returns, as the rank that it is told to be, when the first process trains."""
    descriptor = os.environ.pop(PIPE, None)
    if descriptor is None:
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a terminal interrupts all; the first one answers
    with os.fdopen(int(descriptor)) as pipe:
        variables = pipe.read()
    if not variables:  # the first process has ended
        os._exit(0)
    signal.signal(signal.SIGINT, previous)
    os.environ.update(json.loads(variables))


def release(environments: Sequence[Mapping[str, str]]) -> list[Process]:
    """Lets as many waiting processes as there are environments go on, each in its own; none where none wait."""
    if len(_waiting) != len(environments):
        return []
    for (_, writing), environment in zip(_waiting, environments, strict=True):
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(dict(environment)))
    processes = [process for process, _ in _waiting]
    _waiting.clear()
    return processes


def _end() -> None:
    for process, _ in _waiting:
        process.kill()
        process.wait()
