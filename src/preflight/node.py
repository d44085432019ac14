"""One node's GPUs and their state, NICs, memory, code and packages."""

import hashlib
import os
import resource
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from src.checkpoints.provenance import git_revision, package_versions
from src.units import GIB, counted

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "NCCL_", "GLOO_", "TORCH_NCCL_", "OMP_NUM_THREADS", "CUDA_DEVICE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "DS_ACCELERATOR",
)  # fmt: skip

_GPU_FIELDS = (
    "index,name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total,{},temperature.gpu"
)
_CLOCK_FIELDS = (
    "clocks_event_reasons.active",
    "clocks_throttle_reasons.active",
)  # since driver 535, before
_SLOWED = {0x8: "hardware slowdown", 0x40: "too hot", 0x80: "power brake"}
_BUSY_MIB = 2000  # a driver alone takes less


def code() -> dict[str, str]:
    """The checked-out revision, and a digest of the actual source files."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "src").rglob("*.py")):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return {"revision": git_revision() or "none", "src/": digest.hexdigest()[:12]}


def packages() -> dict[str, str]:
    versions = package_versions()
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def settings() -> dict[str, str]:
    """Environment variables that should be equal on all ranks."""
    return {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}


def gpus(wanted: int) -> tuple[list[str], dict[str, str]]:
    """The problems of this node's GPUs, and what should be equal on all nodes. Call it before CUDA is used."""
    if shutil.which("nvidia-smi") is None:
        return [], {}
    try:
        listing = _smi(f"--query-gpu={_GPU_FIELDS.format(_CLOCK_FIELDS[0])}")
    except RuntimeError:
        listing = _smi(f"--query-gpu={_GPU_FIELDS.format(_CLOCK_FIELDS[1])}")
    try:
        rows = _smi("--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure")
    except RuntimeError:  # GPUs that do not remap rows
        rows = []
    return gpu_problems(listing, rows, wanted), gpu_kinds(listing)


def _smi(query: str) -> list[list[str]]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if result.returncode != 0:
        raise RuntimeError(f"nvidia-smi: {(result.stdout + result.stderr).strip()[:200]}; drain the node")
    return [[word.strip() for word in line.split(",")] for line in result.stdout.splitlines() if line.strip()]


def gpu_kinds(listing: list[list[str]]) -> dict[str, str]:
    return {
        "name": ", ".join(sorted({row[1] for row in listing})),
        "driver": ", ".join(sorted({row[2] for row in listing})),
        "memory MiB": ", ".join(sorted({row[3] for row in listing})),
    }


def gpu_problems(listing: list[list[str]], remapped: list[list[str]], wanted: int) -> list[str]:
    """The problems in nvidia-smi's output for `_GPU_FIELDS` and remapped rows."""
    problems = []
    if len(listing) < wanted:
        problems.append(
            f"{counted(len(listing), 'GPU')}, trainer.devices is {wanted}; some have fallen off the bus: drain the node"
        )
    for index, _, _, _, used, ecc, reasons, celsius in listing:
        if ecc.isdecimal() and int(ecc):
            problems.append(f"GPU {index}: {ecc} uncorrected ECC errors; drain the node and reset the GPU")
        if used.isdecimal() and int(used) > _BUSY_MIB:
            problems.append(f"GPU {index}: {used} MiB in use by another process; end it (nvidia-smi shows it)")
        active = int(reasons, 16) if reasons.startswith("0x") else 0
        slowed = [text for bit, text in _SLOWED.items() if active & bit]
        if slowed:
            problems.append(f"GPU {index}: clock held down ({', '.join(slowed)}, {celsius} C); drain the node")
    for number, (_, pending, failure) in enumerate(remapped):
        if failure not in ("0", "No", "[N/A]"):
            problems.append(f"GPU {number}: remapping a broken row of memory failed; have the GPU replaced")
        elif pending not in ("0", "No", "[N/A]"):
            problems.append(f"GPU {number}: a broken row of memory waits to be remapped; drain the node, reset the GPU")
    return problems


def nics(folder: Path = Path("/sys/class/infiniband")) -> tuple[list[str], dict[str, int]]:
    """Problems; `nics_per_node` and `nic_gbit` of the fastest active ports, empty if there are none."""
    rates, down = [], []
    for port in sorted(folder.glob("*/ports/*")):
        rate = int(float((port / "rate").read_text().split()[0]))
        if "ACTIVE" in (port / "state").read_text():
            rates.append(rate)
        else:
            down.append(f"{port.parts[-3]}/{port.name}")
    if not rates:
        return [f"no InfiniBand port is active ({', '.join(down)} down); drain the node"] if down else [], {}
    return [], {"nics_per_node": rates.count(max(rates)), "nic_gbit": max(rates)}


def memory_limit(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The memory limit of this process's control groups, version 2 (`memory.max`) or 1, in bytes; None without one."""
    limits = []
    for line in process.read_text().splitlines() if process.is_file() else []:
        number, controllers, own = line.split(":", 2)
        if number == "0":
            folder, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A group's limit also applies below it. In a container the path may be the host's; then the root's counts.
        for path in (folder / own.lstrip("/"), *(folder / parent for parent in PurePosixPath(own.lstrip("/")).parents)):
            if (path / name).is_file() and (text := (path / name).read_text().strip()).isdigit():
                limits.append(int(text))
    return min(limits, default=None)


def usable_memory() -> int:
    """Bytes of host memory still available to this process."""
    limit, available = memory_limit(), int(psutil.virtual_memory().available)
    return available if limit is None else min(available, limit)


def memory(host_gib: float | None, cuda: bool, infiniband: bool = False) -> tuple[list[str], dict[str, Any]]:
    """Problems with host memory, of which the run needs `host_gib`; and values for the cluster file."""
    machine, limit, problems = psutil.virtual_memory(), memory_limit(), list[str]()
    available, total = machine.available / GIB, machine.total
    if limit is not None and limit < total:
        total = limit
        if host_gib is not None and limit / GIB < host_gib:
            problems.append(
                f"this job may take {limit / GIB:.0f} GiB of host memory (its cgroup's limit), the plan needs "
                f"{host_gib:.0f}; ask for the node's whole memory (Slurm: --mem=0; a container's --memory)"
            )
    if host_gib is not None and available < host_gib:
        problems.append(
            f"{available:.0f} GiB of host memory are free, the plan needs {host_gib:.0f}; end what else runs there "
            "(`free -g`, tmpfs), or offload less"
        )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if infiniband and locked != resource.RLIM_INFINITY:
        problems.append(
            f"locked memory is limited to {locked >> 10} KiB, which InfiniBand's buffers exceed; "
            "`ulimit -l unlimited` (LimitMEMLOCK=infinity of slurmd.service)"
        )
    shared = shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").is_dir() else 0
    if cuda and shared < 1:
        problems.append(
            f"/dev/shm has {shared:.2f} GiB, NCCL and data workers need more; `--shm-size=16g` in a container"
        )
    return problems, {"host_memory_gib": round(total / GIB, 1), "cpu_cores": os.cpu_count() or 1}


def one_thread(cuda: bool) -> list[str]:
    """Reports too few OpenMP threads for DeepSpeedCPUAdam; torchrun gives each process one."""
    if not cuda or torch.get_num_threads() > 1 or (os.cpu_count() or 1) <= torch.cuda.device_count():
        return []
    return [
        "one thread per rank for the optimizer on the host; set OMP_NUM_THREADS to a rank's cores, as the launch "
        "scripts do"
    ]
