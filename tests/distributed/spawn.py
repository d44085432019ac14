"""One spawn helper for every distributed test: run a function on N gloo processes and collect what each returns.

Processes are forked from a server that has imported the heavy libraries once and used none of them.
"""

import faulthandler
import gc
import multiprocessing
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from src.strategies.operators import prepare_builds

PRELOAD = [
    "torch",
    "deepspeed",
    "lightning.pytorch",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "torch.utils.tensorboard",
    *(f"src.commands.{name}" for name in ("training", "plan", "check_data", "preflight", "rehearse", "verify")),
    "src.commands.export",
    "tests.distributed.training",
    "tests.distributed.preload",
]


def server() -> multiprocessing.context.ForkServerContext:
    """Starts processes by a fork of the server."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    return multiprocessing.get_context("forkserver")


def free_port() -> int:
    """Below those that the system gives out: connections of tests beside this one would take it before rank 0 does."""
    while True:
        port = 10000 + secrets.randbelow(10000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher tells each process of one node."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _entry(rank: int, fn: Callable[..., Any], world_size: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(rank_variables(rank, world_size, port), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    faulthandler.enable()
    gc.freeze()  # a million objects of the libraries, which DeepSpeed's gc.collect() would look through
    prepare_builds()  # for those too that call DeepSpeed without the strategy
    torch.save(fn(*args), Path(folder) / f"{rank}.pt")


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls fn(*args) on `world_size` fresh processes with the rank variables of torchrun set; fn must be importable.

    No process group is made: fn makes its own (or a Trainer does). Returns each rank's value, in rank order.
    """
    server()
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _entry,
            args=(fn, world_size, free_port(), folder, args),
            nprocs=world_size,
            start_method="forkserver",
            join=False,
        )
        try:
            while not context.join():
                pass
        finally:
            for process in context.processes:  # alive where a test ran into its time limit: each prints its stack
                if process.is_alive():
                    os.kill(process.pid, signal.SIGABRT)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
