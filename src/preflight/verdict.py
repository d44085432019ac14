"""Turns all ranks' reports into problems by node, and the cluster's figures."""

from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from src.units import counted

SLOW = 0.8  # fraction of the median below which a node is too slow: a job is as fast as its slowest node
SKEW = 5.0  # seconds

REMEDIES = {
    "code": "check out the same revision there, or start from a shared folder",
    "packages": "set up the same environment there (bash scripts/setup.sh)",
    "environment": "the job's script should set it for all",
    "config": "all nodes should read the same file with the same arguments",
    "weights": "copy the file there again",
    "data": "copy the file there again",
    "GPUs": "the same driver and kind of GPU on all nodes",
    "NICs": "a port is down or has come up slower: `ibstat` shows it; drain the node",
    "arithmetic": "this GPU computes wrong: drain the node, have it tested",
}


@dataclass
class Report:
    """What one rank found. same: topic -> name -> value that must be equal everywhere; rates: higher is better."""

    rank: int
    local_rank: int
    node: str
    problems: list[str] = field(default_factory=list)
    same: dict[str, dict[str, str]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)  # for the cluster file
    network: dict[str, Any] = field(default_factory=dict)
    disk: tuple[int, float, float] | None = None  # bytes, seconds to write, to read
    adam: float | None = None  # 1e9 parameters per second, of the optimizer on the host for this rank
    time: float = 0.0  # the clock, read by all ranks at the same moment


def problems(reports: list[Report], cuda: bool) -> dict[str, list[str]]:
    """Node -> its problems; nodes without problems are absent."""
    by_node: dict[str, list[str]] = {}

    def add(report: Report, text: str) -> None:
        lines = by_node.setdefault(report.node, [])
        if text not in lines:  # several ranks of a node report the same
            lines.append(text)

    for report in reports:
        for text in report.problems:
            add(report, text)
    for topic in REMEDIES:
        for report, text in _differences(topic, reports):
            add(report, text)
    for report in reports:
        off = report.time - median(other.time for other in reports)
        if abs(off) > SKEW:
            add(report, f"its clock is {off:+.0f} s off; start NTP (chronyd) there")
        for rank in report.network.get("wrong", []):
            add(reports[rank], f"rank {rank}'s data arrived changed at rank {report.rank}; drain the node")
    if cuda:
        for report, text in _slow(reports):
            add(report, text)
    return by_node


def _differences(topic: str, reports: list[Report]) -> list[tuple[Report, str]]:
    """The values of a report that differ from the majority's; in a tie from the first report's."""
    having = [report for report in reports if topic in report.same]
    differences = []
    names = {name: None for report in having for name in report.same[topic]}
    for name in names:
        values = Counter(report.same[topic].get(name, "absent") for report in having)
        usual = values.most_common(1)[0][0]
        for report in having:
            value = report.same[topic].get(name, "absent")
            if value != usual:
                differences.append((report, f"{topic}: {name} is {value}, elsewhere {usual}; {REMEDIES[topic]}"))
    counts = Counter(report.node for report, _ in differences)
    shown: Counter[str] = Counter()
    short = []
    for report, text in differences:
        shown[report.node] += 1
        if shown[report.node] <= 3:
            short.append((report, text))
        elif shown[report.node] == 4:
            short.append((report, f"{topic}: {counts[report.node] - 3} more differences"))
    return short


def _slow(reports: list[Report]) -> list[tuple[Report, str]]:
    slow_nodes = []
    for name in {name: None for report in reports for name in report.rates}:
        usual = median(report.rates[name] for report in reports if name in report.rates)
        for report in reports:
            rate = report.rates.get(name, usual)
            if rate < SLOW * usual:
                text = f"GPU {report.local_rank}: {name} {rate:.0f}, the median is {usual:.0f}; drain the node"
                slow_nodes.append((report, text))
    nodes = host_optimizers(reports)
    for report in reports:
        if report.node in nodes and nodes[report.node] < SLOW * (usual := median(nodes.values())):
            slow_nodes.append(
                (
                    report,
                    f"the optimizer on the host (DeepSpeedCPUAdam) {nodes[report.node]:.3g}e9 parameters/s, the median "
                    f"is {usual:.3g}e9; look at OMP_NUM_THREADS, --cpus-per-task and what else runs there",
                )
            )
    pairs = [rate for report in reports for rate in report.network.get("pairs", {}).values()]
    for report in reports:
        # A node is slow if it is slow with both neighbours.
        best = max(report.network.get("pairs", {}).values(), default=None)
        if best is not None and best < SLOW * (usual := median(pairs)):
            text = f"all-gathers with its neighbours {best:.0f} GB/s, the median is {usual:.0f}; look at its NICs"
            slow_nodes.append((report, text))
    return slow_nodes


def host_optimizers(reports: list[Report]) -> dict[str, float]:
    """Node -> 1e9 parameters per second of all its ranks, if all have measured it."""
    nodes: dict[str, list[float | None]] = {}
    for report in reports:
        nodes.setdefault(report.node, []).append(report.adam)
    return {node: sum(r for r in rates if r) for node, rates in nodes.items() if all(rates)}


def cluster(reports: list[Report], cuda: bool) -> dict[str, Any]:
    """The measured fields of `src.planner.cluster.Cluster`; for node figures the weakest node's."""
    fields: dict[str, Any] = {}
    for report in reports:
        for name, value in report.values.items():
            fields[name] = value if name not in fields or isinstance(value, str) else min(fields[name], value)
    if cuda:
        for name in ("matmul_tflops", "pcie_in_gb_s", "pcie_out_gb_s"):
            rates = [report.rates[name] for report in reports if name in report.rates]
            if rates:
                fields[name] = round(min(rates), 1)
        networks = {
            "nccl_inter_node_gb_s": "world",
            "nccl_intra_node_gb_s": "intra",
            "exchange_inter_node_gb_s": "exchange_inter",
            "exchange_intra_node_gb_s": "exchange_intra",
        }
        for name, key in networks.items():
            rates = [report.network[key] for report in reports if key in report.network]
            if rates:
                fields[name] = round(min(rates), 1)
    if cuda and (hosts := host_optimizers(reports)):
        fields["cpu_adam_gparams_s"] = float(f"{min(hosts.values()):.3g}")
    for index, name in ((1, "disk_write_gb_s"), (2, "disk_read_gb_s")):
        nodes: dict[str, list[tuple[int, float]]] = {}
        for report in reports:
            if report.disk is not None:
                nodes.setdefault(report.node, []).append((report.disk[0], report.disk[index]))
        rates = [sum(size for size, _ in parts) / max(s for _, s in parts) / 1e9 for parts in nodes.values()]
        if rates:
            fields[name] = float(f"{min(rates):.3g}")
    return fields


def lines(by_node: dict[str, list[str]], names: list[str], slurm: bool) -> list[str]:
    """One line per failing node and problem, then the verdict."""
    if not by_node:
        return [f"preflight: {counted(len(names), 'node')} ready"]
    failing = [name for name in names if name in by_node]
    printed = [f"{name}: {text}" for name in failing for text in by_node[name]]
    printed.append(f"preflight: {len(failing)} of {counted(len(names), 'node')} failed: {', '.join(failing)}")
    if slurm and len(failing) < len(names):
        printed.append(f"To start without: sbatch --exclude={','.join(failing)} ...  (docs/launching.md: one bad node)")
    return printed
