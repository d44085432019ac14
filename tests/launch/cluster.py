"""A Slurm cluster of two virtual nodes on this machine: a real slurmctld and two real slurmd."""

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")

# Ports are chosen free; `auth/none` needs no munge, one process a node no cgroups.
CONFIG = """ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=5
ReturnToService=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None where it can."""
    if os.geteuid() != 0:
        return "a Slurm cluster is started by root alone"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return f"Slurm is not installed ({', '.join(missing)} missing)" if missing else None


@dataclass
class SlurmCluster:
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        configuration = self.folder / "slurm.conf"
        configuration.write_text(CONFIG.format(folder=self.folder, ports=_free_ports(3)))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        # n1 and n2 do not resolve: rank 0's address is given.
        self.environment = inherited | {"SLURM_CONF": str(configuration), "MASTER_ADDR": "127.0.0.1"}
        for command in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
            self.run(*command)
        self.wait_until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", "two idle nodes", 30)

    def stop(self) -> None:
        self.run("scancel", "-u", "root")
        self.wait_until(lambda: not self.run("squeue", "-h"), "all jobs to end", 30)
        for file in self.folder.glob("*.pid"):
            os.kill(int(file.read_text()), signal.SIGTERM)

    def run(self, *command: str, **more: str) -> str:
        result = subprocess.run(
            command, env=self.environment | more, cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        if result.returncode != 0:
            raise AssertionError(f"{command} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
        return result.stdout

    def submit(self, *command: str, **more: str) -> str:
        """The id of an `sbatch` job."""
        return self.run("sbatch", "--parsable", *command, **more).strip()

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        pairs = (word.partition("=") for word in self.run("scontrol", "show", "job", job).split())
        return {name: value for name, _, value in pairs}

    def wait_until(self, condition: object, what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            if time.monotonic() > deadline:
                logs = "\n".join(f"{log}: {log.read_text()[-1500:]}" for log in self.folder.glob("*.log"))
                raise AssertionError(f"waited {seconds} s for {what}\n{logs}")
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
