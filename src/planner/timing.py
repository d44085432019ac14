"""From the simulated micro-step to an optimizer step, a run and its cost."""

from dataclasses import dataclass

from src.planner.cluster import Cluster
from src.planner.micro_step import micro_step
from src.planner.settings import Settings
from src.planner.streams import (
    CAST,
    COMPUTE,
    EP,
    FROM_HOST,
    HOST,
    SP,
    TO_HOST,
    ZERO,
    Schedule,
    Span,
    busy,
    covered,
    makespan,
    play,
    scaled,
    slowed,
)

# A parameter: fused AdamW on fp32 states 28, flattened gradient 8, its norm in fp64 20, clipping 8, cast to bf16 6; and
# what comes after a step whatever its size: callbacks and logging (measured: 70 to 92 ms at 2.1e9 to 2.8e9 parameters).
ADAM_BYTES, AFTER_STEP = 70, 20e-3
HOST_ADAM_BYTES = 28  # of a parameter, that AdamW on the host reads and writes: it is bound by the memory
HIDDEN = 0.05  # of a micro-step: compute that stalls for less is what the step waits for


@dataclass(frozen=True)
class StepTime:
    """Seconds. micro: one micro-step; forward: of it; exposed: of it, when compute waits; host: of that, what a host
    without work would save; slowed: of it, what compute takes longer beside collectives; travel: of it, when tokens
    travel to shared experts or back and nothing is computed. optimizer: after the last.

    streams: work of each stream in one micro-step, alone on the device.
    """

    micro: float
    forward: float
    exposed: float
    host: float
    slowed: float
    travel: float
    optimizer: float
    step: float
    streams: dict[str, float]
    schedule: Schedule
    spans: list[Span]


def optimizer_seconds(settings: Settings, cluster: Cluster) -> tuple[float, str]:
    """With the formula."""
    own = settings.stepped
    if not settings.offload_optimizer:
        seconds = ADAM_BYTES * own / cluster.copy + AFTER_STEP
        return (
            seconds,
            f"{own / 1e9:.2f}e9 parameters x {ADAM_BYTES} bytes / {cluster.copy / 1e12:.2f} TB/s + {AFTER_STEP:g} s",
        )
    adam = own * settings.gpus / (cluster.cpu_adam_gparams_s * 1e9)
    more = 6 if settings.offload_parameters else 4
    return adam * (1 + more / HOST_ADAM_BYTES) + AFTER_STEP, (
        f"{own * settings.gpus / 1e9:.1f}e9 parameters per node / {cluster.cpu_adam_gparams_s:g}e9 per second "
        f"(DeepSpeedCPUAdam, {HOST_ADAM_BYTES} bytes each) x {HOST_ADAM_BYTES + more}/{HOST_ADAM_BYTES}: new masters "
        f"leave for the device meanwhile; + {AFTER_STEP:g} s"
    )


def step_time(settings: Settings, cluster: Cluster, quick: bool = False) -> StepTime:
    """Plays an optimizer step's last micro-step, and one of the others, whose gradients cross PCIe once less.

    quick: take all micro-steps to be like the last.
    """
    n = settings.accumulate
    last = micro_step(settings, cluster)
    spans = others = play(last.ops)
    if n > 1 and settings.offload_optimizer and not quick:
        others = play(micro_step(settings, cluster, last=False).ops)
    all_micro = (n - 1) * makespan(others) + makespan(spans)
    streams = busy(last.ops)
    optimizer, _ = optimizer_seconds(settings, cluster)
    lost = ((n - 1) * slowed(others) + slowed(spans)) / n
    travel = covered(spans, COMPUTE, EP) - covered(spans, COMPUTE) if settings.ep > 1 else 0.0
    return StepTime(
        micro=all_micro / n,
        forward=makespan(span for span in spans[: last.forward_ops] if span.op.stream in (COMPUTE, SP, EP)),
        exposed=all_micro / n - streams[COMPUTE] - lost - streams[SP] - travel,
        host=0.0 if quick else max(0.0, makespan(spans) - makespan(play(scaled(last.ops, {HOST: 0.0})))),
        slowed=lost,
        travel=travel,
        optimizer=optimizer,
        step=all_micro + optimizer,
        streams=streams,
        schedule=last,
        spans=spans,
    )


def step_seconds(settings: Settings, cluster: Cluster, time: StepTime, other: Cluster, kernels: float) -> float:
    """A step's seconds on a cluster of other rates, kernels `kernels` times as slow: the same schedule played again."""
    s = settings
    rates = {ZERO: s.zero_link, SP: s.link(s.sp), EP: s.link(s.ep), TO_HOST: "pcie_out_gb_s"}
    rates[FROM_HOST] = "pcie_in_gb_s"
    factors = {stream: getattr(cluster, name) / getattr(other, name) for stream, name in rates.items()}
    factors |= {COMPUTE: kernels, CAST: kernels}
    ratio = makespan(play(scaled(time.schedule.ops, factors))) / makespan(time.spans)
    optimizer, _ = optimizer_seconds(s, other)
    return s.accumulate * time.micro * ratio + optimizer * (1.0 if s.offload_optimizer else kernels)


def busiest(time: StepTime) -> str:
    """What a micro-step waits for most."""
    if time.exposed < HIDDEN * time.micro:
        return "compute"
    if time.host > time.exposed / 2:
        return HOST
    name = max((ZERO, TO_HOST, FROM_HOST, CAST), key=lambda stream: time.streams[stream])
    return "ZeRO's network" if name == ZERO else name
