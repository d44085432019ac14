"""One spawn helper for every distributed test: run a function on N gloo processes and collect what each returns.

Processes are forked from a server that has imported the heavy libraries once and used none of them.
"""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

PRELOAD = ["torch", "deepspeed", "lightning.pytorch", "transformers.models.deepseek_v3.modeling_deepseek_v3"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _entry(rank: int, fn: Callable[..., Any], world_size: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        NODE_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    torch.save(fn(*args), Path(folder) / f"{rank}.pt")


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls fn(*args) on `world_size` fresh processes with the rank variables of torchrun set; fn must be importable.

    No process group is made: fn makes its own (or a Trainer does). Returns each rank's value, in rank order.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _entry,
            args=(fn, world_size, free_port(), folder, args),
            nprocs=world_size,
            start_method="forkserver",
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
