"""The machines that a plan counts on, read from a YAML file; what the file does not say is assumed.

`preflight --write FILE` measures and writes one, `plan --cluster FILE` reads it. Units: GiB are 2**30 bytes, GB and
GB/s 10**9 bytes, Gbit 10**9 bits.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Cluster:
    """By default the cluster of the public guide: nodes of 8 H100 80GB, 2 TB of RAM, 400G InfiniBand.

    gpu: its name. gpu_memory_gib: what a program can allocate of it, context included.
    matmul_tflops: a bf16 product of 8192 x 8192 matrices; kernel rates measured on an H100 are scaled by it.
    host_memory_gib, cpu_cores, nics_per_node, disk_*: of a node. nic_gbit: of one NIC.
    nccl_inter_node_gb_s, nccl_intra_node_gb_s: bus bandwidth a GPU of an all-gather over all nodes, within one node.
    pcie_in_gb_s, pcie_out_gb_s: pinned copy to and from a GPU while all GPUs of the node copy.
    cpu_adam_gparams_s: 1e9 parameters a second that DeepSpeedCPUAdam updates on a node, all its ranks together.
    disk_write_gb_s, disk_read_gb_s: the run's file system from one node while all nodes use it; by default 20 GB/s for
        the guide's 32 nodes together (docs/checkpoints.md), 0.625 each.
    measured: the fields that a file gave; the others are assumed.
    """

    gpu: str = "NVIDIA H100 80GB HBM3"
    gpus_per_node: int = 8
    gpu_memory_gib: float = 79.1
    matmul_tflops: float = 760.0
    host_memory_gib: float = 2000.0
    cpu_cores: int = 96
    nics_per_node: int = 8
    nic_gbit: float = 400.0
    nccl_inter_node_gb_s: float = 370.0
    nccl_intra_node_gb_s: float = 370.0
    pcie_in_gb_s: float = 41.0
    pcie_out_gb_s: float = 33.0
    cpu_adam_gparams_s: float = 11.0
    disk_write_gb_s: float = 0.625
    disk_read_gb_s: float = 0.625
    measured: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        for name, value in self.values().items():
            wanted = _TYPES[name]
            if wanted is str:
                if not isinstance(value, str) or not value:
                    raise ValueError(f"{name} is {value!r}; the GPU's name is wanted.")
            elif isinstance(value, bool) or not isinstance(value, int if wanted is int else (int, float)):
                raise ValueError(f"{name} is {value!r}; {'an integer' if wanted is int else 'a number'} is wanted.")
            elif not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be positive and finite.")

    def values(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "measured"}

    @property
    def host_room(self) -> float:
        """Bytes of a node that a run may take: a fiftieth stays for the system."""
        return 0.98 * self.host_memory_gib * 2**30

    @property
    def assumed(self) -> list[str]:
        return [name for name in _TYPES if name not in self.measured]


_TYPES: dict[str, type] = {f.name: type(f.default) for f in fields(Cluster) if f.name != "measured"}


def read_cluster(path: str | Path) -> Cluster:
    """The cluster of a YAML file of `Cluster`'s fields; all other fields keep their defaults and count as assumed.

    Without `nccl_inter_node_gb_s`, it follows from the NICs when the file tells of those: 0.925 of their line rate,
    which is what NCCL reaches on eight NICs of 400G.

    Raises:
        ValueError: no such file, no YAML, an unknown field, a value of the wrong type or range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; `preflight --write {path}` on the cluster makes it.")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from error
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{path} holds no fields but {given!r}; lines like `nics_per_node: 8` are wanted.")
    unknown = [str(name) for name in given if name not in _TYPES]
    if unknown:
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; a cluster has {', '.join(_TYPES)}.")
    try:
        cluster = Cluster(**given, measured=frozenset(given))
        if "nccl_inter_node_gb_s" not in given and {"nics_per_node", "nic_gbit"} & set(given):
            line_rate = cluster.nics_per_node * cluster.nic_gbit / 8
            cluster = Cluster(
                **(cluster.values() | {"nccl_inter_node_gb_s": 0.925 * line_rate}), measured=cluster.measured
            )
        return cluster
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_cluster(path: str | Path, values: Mapping[str, Any]) -> None:
    """Writes the fields that were measured; raises as `read_cluster` for unknown ones and bad values."""
    unknown = [name for name in values if name not in _TYPES]
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; a cluster has {', '.join(_TYPES)}.")
    Cluster(**values)
    ordered = {name: values[name] for name in _TYPES if name in values}
    Path(path).write_text(yaml.safe_dump(ordered, sort_keys=False), encoding="utf-8")
