"""The machines of a plan, read from a YAML file; what the file does not give is assumed.

`preflight --write FILE` measures and writes one, `plan --cluster FILE` reads it. Units: GiB are 2**30 bytes, GB and
GB/s 10**9 bytes, Gbit 10**9 bits.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from src.errors import UserError
from src.planner.cards import H100, Card, card_of
from src.units import GIB

# Measured on H100s: the product of 8192 x 8192 matrices, a device copy (read and written), and pinned copies while all
# four GPUs of a host copy. Assumed: NCCL's bandwidth over a node's NVLink.
TFLOPS, COPY, INTRA_GB_S, PCIE_IN_GB_S, PCIE_OUT_GB_S = 760.0, 2.95e12, 370.0, 41.0, 33.0
OF_LINE_RATE = 0.925  # what NCCL reaches of the NICs' line rate
MEASURED, ASSUMED = 0.05, 0.30  # how far off a rate may be that a file of measurements gave, and one that is assumed
HOST_PART = 0.96  # of a node's memory: the rest stays for the system and for what comes at once


@dataclass(frozen=True)
class Cluster:
    """By default the cluster of the public guide: nodes of 8 H100 80GB, 2 TB of RAM, 400G InfiniBand.

    gpu: its name. gpu_memory_gib: what a program can allocate of it, context included.
    matmul_tflops: a bf16 product of 8192 x 8192 matrices; kernel rates measured on an H100 are scaled by it.
    host_memory_gib, cpu_cores, nics_per_node, disk_*: of a node. nic_gbit: of one NIC.
    nccl_inter_node_gb_s, nccl_intra_node_gb_s: bus bandwidth a GPU of an all-gather over all nodes, within one node.
    exchange_inter_node_gb_s: what a GPU sends in an all-to-all with those of its number on the other nodes, while all
        GPUs do; by default the all-gather's bandwidth over the GPUs of a node. exchange_intra_node_gb_s: to the others
        of its node; by default as the all-gather's.
    pcie_in_gb_s, pcie_out_gb_s: pinned copy to and from a GPU while all GPUs of the node copy.
    cpu_adam_gparams_s: 1e9 parameters a second that DeepSpeedCPUAdam updates on a node, all its ranks together.
    disk_write_gb_s, disk_read_gb_s: the run's file system from one node while all nodes use it; by default 20 GB/s for
        the guide's 32 nodes together (docs/checkpoints.md), 0.625 each.
    measured: the fields that a file gave; the others are assumed.
    copies: where one process stands for all (`rehearse`), bytes per second of the copies that stand for a network.
    """

    gpu: str = "NVIDIA H100 80GB HBM3"
    gpus_per_node: int = 8
    gpu_memory_gib: float = H100.memory_gib
    matmul_tflops: float = TFLOPS
    host_memory_gib: float = 2000.0
    cpu_cores: int = 96
    nics_per_node: int = 8
    nic_gbit: float = H100.nic_gbit
    nccl_inter_node_gb_s: float = 370.0
    nccl_intra_node_gb_s: float = INTRA_GB_S
    exchange_inter_node_gb_s: float = 46.25
    exchange_intra_node_gb_s: float = INTRA_GB_S
    pcie_in_gb_s: float = PCIE_IN_GB_S
    pcie_out_gb_s: float = PCIE_OUT_GB_S
    cpu_adam_gparams_s: float = 11.0
    disk_write_gb_s: float = 0.625
    disk_read_gb_s: float = 0.625
    measured: frozenset[str] = field(default=frozenset(), compare=False)
    copies: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        for name, value in self.values().items():
            wanted = _TYPES[name]
            if wanted is str:
                if not isinstance(value, str) or not value:
                    raise UserError(f"{name} is {value!r}; it must be the GPU's name.")
            elif isinstance(value, bool) or not isinstance(value, int if wanted is int else (int, float)):
                raise UserError(f"{name} is {value!r}; it must be {'an integer' if wanted is int else 'a number'}.")
            elif not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}; it must be positive and finite.")

    def values(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name in _TYPES}

    @property
    def card(self) -> Card:
        """Its data sheet; of a card that is not in the table an H100's, at the peak of which it reaches as much."""
        return card_of(self.gpu) or H100._replace(peak=H100.peak * self.matmul_tflops / TFLOPS)

    # How many times as long as on the H100 of `rates` a kernel takes: one that multiplies matrices, one that passes
    # through memory, FlashAttention-2. The last two follow the data sheets, and the product of this very machine.

    @property
    def kernels(self) -> float:
        return TFLOPS / self.matmul_tflops

    @property
    def elementwise(self) -> float:
        return self._specimen * (H100.memory_tb_s / self.card.memory_tb_s)

    @property
    def varlen(self) -> float:
        return self._specimen / self.card.varlen

    @property
    def _specimen(self) -> float:
        return self.kernels * (self.card.peak / H100.peak)

    @property
    def copy(self) -> float:
        """Bytes a second of a device copy, read and written."""
        return COPY * (self.card.memory_tb_s / H100.memory_tb_s)

    @property
    def host_room(self) -> float:
        """Bytes of a node that a run may take."""
        return HOST_PART * self.host_memory_gib * GIB

    def shifted(self, worse: bool) -> "Cluster":
        """Every bandwidth, and the optimizer's rate, as low, or as high, as it may be."""
        changes = {}
        for name in _TYPES:
            if name.endswith("_s"):
                off = MEASURED if name in self.measured else ASSUMED
                changes[name] = getattr(self, name) * (1 - off if worse else 1 + off)
        return replace(self, **changes)

    @property
    def assumed(self) -> list[str]:
        return [name for name in _TYPES if name not in self.measured]


_TYPES: dict[str, type] = {f.name: type(f.default) for f in fields(Cluster) if f.compare}


def read_cluster(path: str | Path) -> Cluster:
    """The cluster of a YAML file of `Cluster`'s fields; all other fields count as assumed (`cluster_of`).

    Raises:
        ValueError: no such file, no YAML, an unknown field, a value of the wrong type or range, an unknown GPU whose
            memory or speed the file does not give.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"{path} does not exist; `preflight --write {path}` on the cluster makes it.")
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give another file, or its rights to you.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}.") from error
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise UserError(f"{path} holds no fields but {given!r}; write lines such as `nics_per_node: 8`.")
    try:
        return cluster_of(given)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def cluster_of(given: Mapping[str, Any]) -> Cluster:
    """A cluster of which the fields `given` were measured.

    The others are the default's, but for what follows from the GPU's data sheet (memory, product, bandwidths of its
    links); from the GPUs of a node, which have a NIC each; and from the NICs, of whose line rate NCCL reaches 0.925.
    """
    cluster = _checked(given)
    card = card_of(cluster.gpu)
    if card is None and (absent := [name for name in ("gpu_memory_gib", "matmul_tflops") if name not in given]):
        raise UserError(
            f"gpu {cluster.gpu!r} is unknown; give its {' and '.join(absent)} too, as `preflight --write` does."
        )
    card = card or cluster.card
    values: dict[str, Any] = {
        "gpu_memory_gib": card.memory_gib,
        "matmul_tflops": TFLOPS * card.peak / H100.peak,
        "nics_per_node": cluster.gpus_per_node,
        "nic_gbit": card.nic_gbit,
        "nccl_intra_node_gb_s": INTRA_GB_S * card.link_gb_s / H100.link_gb_s,
        "pcie_in_gb_s": PCIE_IN_GB_S * card.pcie_gb_s / H100.pcie_gb_s,
        "pcie_out_gb_s": PCIE_OUT_GB_S * card.pcie_gb_s / H100.pcie_gb_s,
    } | dict(given)
    line_rate = values["nics_per_node"] * values["nic_gbit"] / 8
    values = {"nccl_inter_node_gb_s": OF_LINE_RATE * line_rate} | values
    exchanges = {
        "exchange_inter_node_gb_s": values["nccl_inter_node_gb_s"] / cluster.gpus_per_node,
        "exchange_intra_node_gb_s": values["nccl_intra_node_gb_s"],
    }
    return Cluster(**(exchanges | values), measured=frozenset(given))


def _checked(given: Mapping[str, Any]) -> Cluster:
    """The default cluster with the fields `given`."""
    if unknown := [str(name) for name in given if name not in _TYPES]:
        raise UserError(f"unknown {', '.join(unknown)}; a cluster has {', '.join(_TYPES)}.")
    return Cluster(**given)


def write_cluster(path: str | Path, values: Mapping[str, Any]) -> None:
    """Writes the fields that were measured; raises as `read_cluster` for unknown ones and bad values."""
    _checked(values)
    ordered = {name: values[name] for name in _TYPES if name in values}
    Path(path).write_text(yaml.safe_dump(ordered, sort_keys=False), encoding="utf-8")
