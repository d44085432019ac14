"""`preflight`: checks every node for a run of this config, and measures the cluster."""

import os
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import Namespace

from src.callbacks.step_checkpoint import checkpoint_folder
from src.callbacks.weights_checkpoint import weights_folder
from src.commands.checks import check_experts_divide, newest_checkpoint, parallel_dims
from src.commands.config_command import ConfigCommand
from src.commands.outputs import check_output, writes
from src.commands.planned import settings_of
from src.commands.writable import unwritable
from src.errors import UserError
from src.models.deepseek_v3.config_json import read_fields
from src.planner import account
from src.planner.cluster import Cluster, write_cluster
from src.planner.ledger import total
from src.planner.settings import Settings
from src.preflight import files, measure, node
from src.preflight.ranks import Absent, Ranks, meet
from src.preflight.verdict import Report, cluster, lines, problems
from src.strategies.operators import prepare_builds
from src.units import GIB, counted

_WRITTEN = {"cuda": 1 << 30, "cpu": 16 << 20}  # bytes per rank, to measure the disk


class PreflightCLI(ConfigCommand):
    """Runs on every rank of a job, one task per GPU, as `fit` does; alone it checks this machine. Exits with 1 on
    every rank if any node fails."""

    name = "preflight"

    def run_command(self) -> None:
        settings, ranks = self.config, Ranks.from_environment()
        cuda = settings.trainer.accelerator != "cpu" and torch.cuda.is_available()
        report = Report(ranks.rank, ranks.local_rank, ranks.node)
        report.same["config"] = {
            key: str(value) for key, value in vars(settings.as_flat()).items() if key not in ("config", "write")
        }
        if settings.trainer.accelerator not in ("cpu", "auto") and not cuda:
            report.problems.append("no GPU can be used; look at nvidia-smi, and whether this PyTorch is a CUDA build")
        write = settings.write
        if ranks.rank == 0:
            try:
                check_output("--write", write)
            except UserError as error:
                if ranks.world_size == 1:
                    self.parser.error(str(error))
                report.problems.append(str(error))  # the other ranks must not wait
                write = None
        if ranks.leads_node:
            _look(report, settings, cuda)
        try:
            meet(ranks, "cpu:gloo,cuda:nccl" if cuda else "gloo")
        except Absent as error:
            print(error, flush=True)
            raise SystemExit(1) from None
        try:
            _look_together(report, ranks, settings, cuda)
        except Exception as error:  # the others notice the lost connection
            print(f"{ranks.node}: rank {ranks.rank}: {error!r}", flush=True)
            raise SystemExit(1) from error
        reports: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(reports, report)
        by_node = problems(reports, cuda)
        if ranks.rank == 0:
            names = list(dict.fromkeys(report.node for report in reports))
            measured = cluster(reports, cuda)
            print(_summary(ranks, reports, measured) + _experts_across_nodes(settings.trainer))
            print("\n".join(lines(by_node, names, "SLURM_JOB_ID" in os.environ)), flush=True)
        dist.barrier()
        dist.destroy_process_group()
        if ranks.rank == 0 and write:  # no other rank waits
            with writes("--write", write):
                write_cluster(write, measured)
        if by_node:
            raise SystemExit(1)


def _try(report: Report, what: str, function: Callable[[], Any], default: Any = None) -> Any:
    """Turns any exception of a check into a problem of this node, so that the other ranks do not wait."""
    try:
        return function()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        report.problems.append(f"{what}: {reason}")
        return default


def _look(report: Report, settings: Namespace, cuda: bool) -> None:
    """Once per node, before CUDA is used."""
    trainer, data, model = settings.trainer, settings.data, settings.model
    root = trainer.default_root_dir or "."
    resumes = settings.ckpt_path not in (None, "auto") or (settings.ckpt_path == "auto" and newest_checkpoint(root))
    config_only = bool(model.from_scratch or resumes)  # as `fit` demands
    same = report.same
    same["code"] = _try(report, "code", node.code, {})
    same["packages"] = _try(report, "packages", node.packages, {})
    same["environment"] = node.settings()
    same["weights"] = _try(report, "weights", lambda: files.weights(model.pretrained, config_only), {})
    _try(report, "experts", lambda: _check_experts(settings))
    val_sets = (file for files_of in (data.val_sets or {}).values() for file in files_of)
    patterns = [*(data.train_files or []), *(data.val_files or []), *val_sets]
    same["data"] = _try(report, "data", lambda: files.data(patterns), {})
    if not (blocked := unwritable(settings)):
        _try(report, "trainer.default_root_dir", lambda: Path(root).mkdir(parents=True, exist_ok=True))
    report.problems += blocked
    if cuda:
        wanted = int(trainer.devices) if str(trainer.devices).isdecimal() else 0
        broken, same["GPUs"] = _try(report, "GPUs", lambda: node.gpus(wanted), ([], {}))
        report.problems += broken
        report.values |= {
            "gpu": torch.cuda.get_device_name(0),
            "gpus_per_node": torch.cuda.device_count(),
            "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / GIB, 1),
        }
    broken, ports = _try(report, "NICs", node.nics, ([], {}))
    report.problems += broken
    same["NICs"] = {name: str(value) for name, value in ports.items()}
    report.values |= ports
    host, disk = _needs(settings)
    broken, has = node.memory(host if cuda else None, cuda, infiniband=bool(ports))
    report.problems += broken
    report.values |= has
    if disk is not None and report.rank == 0:
        _check_room(report, root, disk)


def _check_experts(settings: Namespace) -> None:
    """Raises ValueError where expert_parallel_size does not suit nodes and model."""
    if (dims := parallel_dims(settings.trainer)) is not None and dims.ep > 1:
        check_experts_divide(settings.trainer, read_fields(settings.model.pretrained)["n_routed_experts"])


def _experts_across_nodes(trainer: Namespace) -> str:
    """A line where ranks of several nodes share their experts."""
    try:
        dims = parallel_dims(trainer)
    except UserError:  # a problem of the report
        return ""
    if dims is None or not dims.leaves_node:
        return ""
    nodes = dims.ep // (dims.per_node or 1)
    return (
        f"\nexperts: expert_parallel_size {dims.ep} leaves the nodes of {dims.per_node} ranks: nodes 0 to {nodes - 1} "
        f"are the first group, and so on; computation waits for tokens on their network"
    )


def _planned(settings: Namespace) -> Settings | None:
    """The config as `plan` sees it; None if it cannot plan it."""
    try:
        return settings_of(settings, Cluster())
    except Exception:  # `plan` says why; here the other ranks must not wait
        return None


def _needs(settings: Namespace) -> tuple[float | None, float | None]:
    """Planned GiB of a node's host memory, and bytes on disk."""
    if (planned := _planned(settings)) is None:
        return None, None
    return total(account.host(planned)) / GIB, total(account.disk(planned))


def _check_room(report: Report, root: str, needed: float) -> None:
    folders = (checkpoint_folder(root), weights_folder(root))
    there = sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())
    free = _try(report, "disk", lambda: files.free_gb(root))
    if free is not None and free + there / 1e9 < needed / 1e9:
        report.problems.append(
            f"{free:,.0f} GB are free in {root}, its checkpoints, weights and export come to {needed / 1e9:,.0f}: make "
            "room, keep fewer (checkpoint.keep, weights.keep), or write elsewhere (trainer.default_root_dir)"
        )


def _look_together(report: Report, ranks: Ranks, settings: Namespace, cuda: bool) -> None:
    """The checks that need other ranks; every rank takes the same steps, whatever it finds."""
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    root = settings.trainer.default_root_dir or "."
    _check_shared(report, ranks, root)
    devices = str(settings.trainer.devices)
    asked = settings.trainer.num_nodes * int(devices) if devices.isdecimal() else ranks.world_size
    if ranks.world_size > 1 and asked != ranks.world_size:
        report.problems.append(
            f"{counted(ranks.world_size, 'rank was', 'ranks were')} started, the config has "
            f"trainer.num_nodes {settings.trainer.num_nodes} x "
            f"trainer.devices {devices}; make them agree"
        )
    wants_gpu = settings.trainer.accelerator not in ("cpu", "auto")
    works = cuda or not wants_gpu
    if cuda and (product := _try(report, f"GPU {ranks.local_rank}", lambda: measure.product(device))) is not None:
        report.rates["matmul_tflops"], report.same["arithmetic"] = product[0], {"product": product[1]}
    elif cuda:
        works = False
    # From here on ranks wait for one another, so none may lack a GPU.
    if _all_agree(works and device.type):
        if cuda:
            report.rates["pcie_in_gb_s"], report.rates["pcie_out_gb_s"] = measure.copies(device, dist.barrier)
        report.network = measure.network(ranks, device)
    _measure_host_optimizer(report, settings, device)
    size = _WRITTEN[device.type]
    if _all_agree(os.access(root, os.W_OK)):
        report.disk = (size, *files.disk_seconds(root, size, dist.barrier))
    dist.barrier()
    report.time = time.time()


def _measure_host_optimizer(report: Report, settings: Namespace, device: torch.device) -> None:
    """Where all ranks find that the config wants one."""
    planned = _planned(settings)

    def build() -> Callable[[], float]:
        prepare_builds()
        return measure.host_optimizer(device)

    adam_rate: Callable[[], float] | None = None
    if _all_agree(planned is not None and planned.offload_optimizer):
        adam_rate = _try(report, "the optimizer on the host (DeepSpeedCPUAdam)", build)
        report.problems += node.one_thread(device.type == "cuda")
    if _all_agree(adam_rate is not None) and adam_rate is not None:
        report.adam = adam_rate()


def _all_agree(here: str | bool) -> bool:
    """Whether all ranks give the same answer, and none False; collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, here)
    return values[0] is not False and all(value == values[0] for value in values)


def _check_shared(report: Report, ranks: Ranks, root: str) -> None:
    """Checks that all nodes see one folder for checkpoints."""
    token: list[Any] = [None]
    if ranks.rank == 0 and os.access(root, os.W_OK):
        token = [f".preflight-of-all-{os.getpid()}-{time.time_ns()}"]
        (Path(root) / token[0]).touch()
    dist.broadcast_object_list(token)
    if token[0] is not None and not (Path(root) / token[0]).is_file():
        report.problems.append(
            f"trainer.default_root_dir {root} is not the folder that rank 0's node sees; checkpoints need one that is "
            "shared by all nodes"
        )
    dist.barrier()
    if ranks.rank == 0 and token[0] is not None:
        (Path(root) / token[0]).unlink()


def _summary(ranks: Ranks, reports: list[Report], measured: dict[str, Any]) -> str:
    order = [f.name for f in fields(Cluster) if f.name in measured]
    each = counted(ranks.ranks_per_node, "rank")
    parts = [f"{counted(ranks.nodes, 'node')} x {each}"] if ranks.world_size > 1 else ["this machine alone"]
    code = reports[0].same.get("code", {})
    parts.append(f"revision {code.get('revision')}, torch {reports[0].same.get('packages', {}).get('torch')}")
    worst = ", ".join(f"{name} {measured[name]}" for name in order)
    return f"preflight: {'; '.join(parts)}\nthe weakest node: {worst}"
