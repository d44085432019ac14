"""The participating ranks, from srun's or torchrun's variables, and a rendezvous that names absent ones."""

import os
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment

PATIENCE = 300.0  # seconds: hundreds of processes import PyTorch from one file system


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    local_rank: int
    ranks_per_node: int
    node: str
    address: str
    port: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Ranks":
        """One task per GPU under srun, one worker per GPU under torchrun, else this process alone."""
        if "TORCHELASTIC_RUN_ID" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
        else:
            return cls(0, 1, 0, 1, socket.gethostname(), "127.0.0.1", 0)
        rank, world_size, local_rank = (int(environment[name]) for name in names[:3])
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            ranks_per_node=int(environment.get(names[3], "1")),
            node=environment.get("SLURMD_NODENAME") or socket.gethostname(),
            address=environment.get("MASTER_ADDR") or _first_node(environment),
            port=int(environment.get("MASTER_PORT", "29500")),
        )

    @property
    def nodes(self) -> int:
        return self.world_size // self.ranks_per_node

    @property
    def leads_node(self) -> bool:
        return self.local_rank == 0

    def names(self) -> list[str]:
        """The nodes' names if Slurm knows them, else their indices."""
        with suppress(OSError, subprocess.CalledProcessError, KeyError):
            hosts = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
            listed = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()
            if len(listed) == self.nodes:
                return listed
        return [f"node number {index}" for index in range(self.nodes)]


class Absent(RuntimeError):
    """Names the absent nodes, or the address that cannot be reached."""


def meet(ranks: Ranks, backend: str, patience: float = PATIENCE) -> None:
    """Starts the process group of all ranks.

    Raises:
        Absent: on rank 0, some ranks did not come in time; on another, rank 0 cannot be reached.
    """
    # torchrun's agent listens on the port itself, for its workers to join.
    leads = ranks.rank == 0 and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
    try:
        store = dist.TCPStore(
            ranks.address,
            ranks.port,
            is_master=leads,
            wait_for_workers=False,
            timeout=timedelta(seconds=patience + 30),
        )
        store.set(f"preflight/{ranks.rank}", ranks.node)
        if ranks.rank == 0:
            _await_all(store, ranks, patience)
            store.set("preflight/all", "here")
        store.wait(["preflight/all"], timedelta(seconds=patience + 30))
    except dist.DistError as error:
        where = f"{ranks.address}:{ranks.port}"
        raise Absent(
            f"{ranks.node}: rank {ranks.rank} does not reach rank 0 at {where}, or rank 0 gave up "
            f"({str(error).splitlines()[0][:120]}); look at the network, and at NETWORK_INTERFACE in docs/launching.md"
        ) from error
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("preflight", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=600),
    )


def _await_all(store: dist.Store, ranks: Ranks, patience: float) -> None:
    deadline = time.monotonic() + patience
    missing = list(range(ranks.world_size))
    while missing := [rank for rank in missing if not store.check([f"preflight/{rank}"])]:
        if time.monotonic() > deadline:
            names, lines = ranks.names(), []
            for node in sorted({rank // ranks.ranks_per_node for rank in missing}):
                absent = [rank for rank in missing if rank // ranks.ranks_per_node == node]
                lines.append(
                    f"{names[node]}: ranks {', '.join(map(str, absent))} did not come within {patience:.0f} s; see "
                    "what they printed, and whether the node answers and reaches rank 0"
                )
            raise Absent("\n".join(lines))
        time.sleep(0.1)


def _first_node(environment: Mapping[str, str]) -> str:
    """Rank 0's address from Slurm, for a step without a launch script."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    several = nodes is not None and int(environment.get("SLURM_NNODES", "1")) > 1
    return SLURMEnvironment.resolve_root_node_address(nodes) if nodes and several else "127.0.0.1"
