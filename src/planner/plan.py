"""Does it fit, how long does it take, how much disk: one run's plan, from its settings and the cluster."""

import math
from dataclasses import dataclass, replace

from src.models.deepseek_v3.flops import packed_flops
from src.planner import account
from src.planner.cluster import Cluster
from src.planner.ledger import Line
from src.planner.settings import Settings
from src.planner.timing import (
    StepTime,
    busiest,
    load_seconds,
    optimizer_seconds,
    save_stall,
    step_seconds,
    step_time,
    write_seconds,
)
from src.planner.work import Work
from src.units import GIB

# How far off an input may be: what a file of measurements gave, what is assumed, and the kernels' own rates.
MEASURED, ASSUMED, KERNELS = 0.05, 0.30, 0.05
RATES = (
    "nccl_inter_node_gb_s",
    "nccl_intra_node_gb_s",
    "exchange_inter_node_gb_s",
    "exchange_intra_node_gb_s",
    "pcie_in_gb_s",
    "pcie_out_gb_s",
    "cpu_adam_gparams_s",
    "disk_write_gb_s",
)


@dataclass(frozen=True)
class Data:
    """What is trained on. epochs: None where max_steps alone ends the run. source says where the numbers are from."""

    rows: int
    tokens: int
    epochs: int | None
    source: str
    max_steps: int | None = None


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds. device, overhead, host, disk: the lines of the account; moment: when the device is fullest."""

    settings: Settings
    cluster: Cluster
    data: Data
    device: list[Line]
    overhead: list[Line]
    moment: str
    host: list[Line]
    disk: list[Line]
    time: StepTime
    slowest: float  # seconds a step, with every input at its worst and at its best
    fastest: float

    @property
    def allocated(self) -> float:
        return sum(line.nbytes for line in self.device)

    @property
    def device_total(self) -> float:
        return self.allocated + sum(line.nbytes for line in self.overhead)

    @property
    def host_total(self) -> float:
        return sum(line.nbytes for line in self.host)

    @property
    def device_room(self) -> float:
        return self.cluster.gpu_memory_gib * GIB

    @property
    def host_room(self) -> float:
        return self.cluster.host_room

    @property
    def fits(self) -> bool:
        return (self.settings.cpu or self.device_total <= self.device_room) and self.host_total <= self.host_room

    @property
    def step_tokens(self) -> float:
        """Of an optimizer step over all ranks, as the data fills them."""
        fill = self.data.tokens / (self.data.rows * self.settings.max_length)
        return self.settings.rows_per_step * self.settings.max_length * min(1.0, fill)

    def rate(self, seconds: float | None = None) -> float:
        """Tokens a second and GPU."""
        return self.step_tokens / self.settings.world / (seconds or self.time.step)

    def mfu(self, seconds: float | None = None) -> float:
        flops = step_flops(self.settings) * self.settings.dp * self.settings.accumulate
        return flops / self.settings.world / (seconds or self.time.step) / (1e12 * self.cluster.card.peak)

    @property
    def steps(self) -> int:
        if self.data.epochs is None and self.data.max_steps is not None:
            return self.data.max_steps
        whole = math.ceil(self.data.rows / self.settings.rows_per_step) * (self.data.epochs or 1)
        return whole if self.data.max_steps is None else min(whole, self.data.max_steps)

    @property
    def saves(self) -> int:
        every = self.settings.checkpoint_every
        return max(1, math.ceil(self.steps / every)) if every else 1

    def wall(self, step_seconds: float | None = None) -> float:
        """Seconds from reading the weights to the last checkpoint on the disk."""
        stalls = self.saves * save_stall(self.settings, self.cluster)
        last = write_seconds(self.settings, self.cluster) if self.settings.async_save else 0.0
        load = load_seconds(self.settings, self.cluster)
        return load + self.steps * (step_seconds or self.time.step) + stalls + last

    @property
    def binding(self) -> str:
        """What stands in the way, or, where the run fits, what its step waits for."""
        s, problems = self.settings, []
        if not s.cpu and self.device_total > self.device_room:
            largest = max(self.device, key=lambda line: line.nbytes)
            problems.append(
                f"GPU memory at {self.moment}: {self.device_total / GIB:.1f} GiB of {self.device_room / GIB:.1f}, "
                f"most of it {largest.name} ({largest.nbytes / GIB:.1f} GiB)"
            )
        if self.host_total > self.host_room:
            largest = max(self.host, key=lambda line: line.nbytes)
            problems.append(
                f"host memory: {self.host_total / GIB:.0f} GiB per node of {self.host_room / GIB:.0f}, "
                f"most of it {largest.name} ({largest.nbytes / GIB:.0f} GiB)"
            )
        if problems:
            return "; ".join(problems)
        if s.cpu:
            return "the CPU: no rates were measured for it"
        if self.time.optimizer > 0.4 * self.time.step:
            return f"the optimizer's step on the host, {self.time.optimizer:.1f} s of {self.time.step:.1f}"
        waits = self.time.exposed / self.time.micro
        return f"{busiest(self.time)}" + (
            f", on which compute stalls for {waits:.0%} of a micro-step" if waits > 0.05 else ""
        )

    @property
    def verdict(self) -> str:
        """One line, as the configs carry it in a comment."""
        if self.settings.cpu:
            memory = self.device_total / GIB * self.settings.gpus + self.host_total / GIB
            return (
                f"CPU: about {memory:.0f} GiB per node, no rates measured"
                if self.fits
                else f"does not fit: {self.binding}"
            )
        if not self.fits:
            return f"does not fit: {self.binding}"
        return (
            f"fits: {self.device_total / GIB:.1f} of {self.device_room / GIB:.1f} GiB, "
            f"{self.rate():.0f} tokens/s per GPU, MFU {self.mfu():.1%}"
        )


def step_flops(settings: Settings) -> int:
    """Useful operations of one SP group's micro-step; every token a target."""
    s, tokens = settings.sizes, settings.row_tokens
    squares = int(tokens * min(settings.document, settings.max_length))
    return packed_flops(s, tokens, squares, tokens * (2 if s.mtp else 1), mtp=s.mtp)


def shifted(cluster: Cluster, worse: bool) -> Cluster:
    """Every rate as low, or as high, as it may be."""
    changes = {}
    for name in RATES:
        by = MEASURED if name in cluster.measured else ASSUMED
        changes[name] = getattr(cluster, name) * (1 - by if worse else 1 + by)
    return replace(cluster, **changes)


def make_plan(settings: Settings, cluster: Cluster, data: Data, quick: bool = False) -> Plan:
    """quick: without the range, and the step from one micro-step: for many plans at once."""
    time = step_time(settings, cluster, quick)
    device, moment = account.allocated(settings, time.schedule)
    slowest = fastest = time.step
    if not quick:
        slowest = step_seconds(settings, cluster, time, shifted(cluster, True), 1 + KERNELS)
        fastest = step_seconds(settings, cluster, time, shifted(cluster, False), 1 - KERNELS)
    return Plan(
        settings,
        cluster,
        data,
        device,
        [] if settings.cpu else account.overhead(settings, sum(line.nbytes for line in device)),
        moment,
        account.host(settings, Work(settings, cluster)),
        account.disk(settings),
        time,
        slowest,
        fastest,
    )


def optimizer_why(plan: Plan) -> str:
    return optimizer_seconds(plan.settings, plan.cluster)[1]
