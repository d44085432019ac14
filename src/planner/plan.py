"""Does it fit, how long does it take, how much disk: one run's plan, from its settings and the cluster."""

import math
from dataclasses import dataclass
from functools import cached_property

from src.models.deepseek_v3.flops import packed_flops
from src.planner import account
from src.planner.cluster import Cluster
from src.planner.ledger import Line, total
from src.planner.settings import Settings
from src.planner.timing import HIDDEN, StepTime, busiest, step_seconds, step_time
from src.units import GIB

KERNELS = 0.05  # how far off the kernels' own rates may be
LONG_OPTIMIZER = 0.4  # of a step: then the optimizer is what it waits for
STOP_MARGIN = 60  # seconds that a stop has besides what is planned for it
ORDINARY_COPY_GB_S = 8.0  # a process of the host copying between ordinary memory and the device


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
    """Bytes and seconds. slowest, fastest: of a step, with every input at its worst and at its best."""

    settings: Settings
    cluster: Cluster
    data: Data
    time: StepTime
    slowest: float
    fastest: float

    # -- memory and disk: the lines of the account --------------------------------------------------------------------

    @cached_property
    def _allocated(self) -> tuple[list[Line], str]:
        return account.allocated(self.settings, self.time.schedule)

    @property
    def device(self) -> list[Line]:
        return self._allocated[0]

    @property
    def moment(self) -> str:
        """When the device is fullest."""
        return self._allocated[1]

    @cached_property
    def overhead(self) -> list[Line]:
        return [] if self.settings.cpu else account.overhead(self.settings, self.allocated)

    @cached_property
    def host(self) -> list[Line]:
        return account.host(self.settings)

    @property
    def disk(self) -> list[Line]:
        return account.disk(self.settings)

    @property
    def allocated(self) -> float:
        return total(self.device)

    @property
    def device_total(self) -> float:
        return self.allocated + total(self.overhead)

    @property
    def host_total(self) -> float:
        return total(self.host)

    @property
    def device_room(self) -> float:
        return self.cluster.gpu_memory_gib * GIB

    @property
    def fits(self) -> bool:
        return not self._problems

    @cached_property
    def _problems(self) -> list[str]:
        """What does not fit."""
        problems = []
        if not self.settings.cpu and self.device_total > self.device_room:
            largest = max(self.device, key=lambda line: line.nbytes)
            problems.append(
                f"GPU memory at {self.moment}: {self.device_total / GIB:.1f} GiB of {self.device_room / GIB:.1f}, "
                f"most of it {largest.name} ({largest.nbytes / GIB:.1f} GiB)"
            )
        if self.host_total > self.cluster.host_room:
            largest = max(self.host, key=lambda line: line.nbytes)
            problems.append(
                f"host memory: {self.host_total / GIB:.0f} GiB per node of {self.cluster.host_room / GIB:.0f}, "
                f"most of it {largest.name} ({largest.nbytes / GIB:.0f} GiB)"
            )
        return problems

    # -- time ---------------------------------------------------------------------------------------------------------

    @property
    def step_tokens(self) -> float:
        """Of an optimizer step over all ranks, as the data fills them."""
        fill = self.data.tokens / (self.data.rows * self.settings.max_length)
        return self.settings.rows_per_step * self.settings.max_length * min(1.0, fill)

    @property
    def gpu_flops(self) -> float:
        """Useful operations per GPU and micro-step; every token a target."""
        s, tokens = self.settings, self.settings.row_tokens
        squares = int(tokens * min(s.document, s.max_length))
        return packed_flops(s.sizes, tokens, squares, tokens * (2 if s.sizes.mtp else 1), mtp=s.sizes.mtp) / s.sp

    def rate(self, step: float | None = None) -> float:
        """Tokens/s per GPU; where not of the planned step, of one of so many seconds. So do `mfu` and `wall`."""
        return self.step_tokens / self.settings.world / (step or self.time.step)

    def mfu(self, step: float | None = None) -> float:
        return self.gpu_flops * self.settings.accumulate / (step or self.time.step) / (1e12 * self.cluster.card.peak)

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

    def wall(self, step: float | None = None) -> float:
        """Seconds from reading the weights to the last checkpoint on the disk."""
        last = self.write_seconds() if self.settings.async_save else 0.0
        return self.load_seconds + self.steps * (step or self.time.step) + self.saves * self.save_stall + last

    # Files: all nodes read and write at once.

    @property
    def save_stall(self) -> float:
        """Seconds that training stands still for one save: the copy to host memory, or the whole write."""
        if self.settings.async_save:
            return account.checkpoint_bytes(self.settings) / self.settings.world / (ORDINARY_COPY_GB_S * 1e9)
        return self.write_seconds()

    def write_seconds(self, cluster: Cluster | None = None) -> float:
        """Of a checkpoint; where not on the plan's cluster, on another."""
        gb_s = (cluster or self.cluster).disk_write_gb_s
        return account.checkpoint_bytes(self.settings) / self.settings.nodes / (gb_s * 1e9)

    @property
    def slowest_write(self) -> float:
        return self.write_seconds(self.cluster.shifted(worse=True))

    @property
    def load_seconds(self) -> float:
        """Reading the base weights in BF16, every byte once in the cluster."""
        return account.export_bytes(self.settings) / self.settings.nodes / (self.cluster.disk_read_gb_s * 1e9)

    @property
    def export_seconds(self) -> float:
        """Writing BF16 weights from the running job."""
        return account.export_bytes(self.settings) / self.settings.nodes / (self.cluster.disk_write_gb_s * 1e9)

    @property
    def stop_lead(self) -> float:
        """Seconds before the end of a job's time in which `src.callbacks.stop` has to begin."""
        return self.slowest + 2 * self.slowest_write + STOP_MARGIN

    # -- in a line ----------------------------------------------------------------------------------------------------

    @property
    def binding(self) -> str:
        """Why the run does not fit, or, where it fits, what its step waits for."""
        time = self.time
        if self._problems:
            return "; ".join(self._problems)
        if self.settings.cpu:
            return "the CPU: no rates were measured for it"
        if time.optimizer > LONG_OPTIMIZER * time.step:
            return f"the optimizer's step on the host, {time.optimizer:.1f} s of {time.step:.1f}"
        waits = time.exposed / time.micro
        return busiest(time) + (f", on which compute stalls for {waits:.0%} of a micro-step" if waits > HIDDEN else "")

    @property
    def verdict(self) -> str:
        """One line, as the configs carry it in a comment."""
        if not self.fits:
            return f"does not fit: {self.binding}"
        if self.settings.cpu:
            memory = self.device_total / GIB * self.settings.gpus + self.host_total / GIB
            return f"CPU: about {memory:.0f} GiB per node, no rates measured"
        return (
            f"fits: {self.device_total / GIB:.1f} of {self.device_room / GIB:.1f} GiB, "
            f"{self.rate():.0f} tokens/s per GPU, MFU {self.mfu():.1%}"
        )


def make_plan(settings: Settings, cluster: Cluster, data: Data, quick: bool = False) -> Plan:
    """quick: without the range, and the step from one micro-step: for many plans at once."""
    time = step_time(settings, cluster, quick)
    slowest = fastest = time.step
    if not quick:
        slowest = step_seconds(settings, cluster, time, cluster.shifted(worse=True), 1 + KERNELS)
        fastest = step_seconds(settings, cluster, time, cluster.shifted(worse=False), 1 - KERNELS)
    return Plan(settings, cluster, data, time, slowest, fastest)
