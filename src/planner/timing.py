"""From the simulated micro-step to an optimizer step, a run and its cost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from src.planner.account import checkpoint_bytes
from src.planner.cluster import Cluster
from src.planner.micro_step import micro_step
from src.planner.schedule import Schedule
from src.planner.settings import Settings
from src.planner.streams import CAST, COMPUTE, EP, FROM_HOST, GATHER, HOST, SP, TO_HOST, Op, Span, busy, makespan, play
from src.planner.work import Work

# A parameter: fused AdamW on fp32 states 28, flattened gradient 8, its norm in fp64 20, clipping 8, cast to bf16 6; and
# what comes after a step whatever its size: callbacks and logging (measured: 70 to 92 ms at 2.1e9 to 2.8e9 parameters).
ADAM_BYTES, AFTER_STEP = 70, 20e-3
HOST_ADAM_BYTES = 28  # of a parameter, that AdamW on the host reads and writes: it is bound by the memory
ORDINARY_COPY_GB_S = 8.0  # a process of the host copying between ordinary memory and the device


@dataclass(frozen=True)
class StepTime:
    """Seconds. micro: one micro-step; forward: of it; exposed: of it, when compute waits; host: of that, what a host
    without work would save; slowed: of it, what compute takes longer beside collectives. optimizer: after the last.

    streams: work of each stream in one micro-step, had it the device for itself.
    """

    micro: float
    forward: float
    exposed: float
    host: float
    slowed: float
    optimizer: float
    step: float
    streams: dict[str, float]
    schedule: Schedule
    spans: list[Span]


def optimizer_seconds(settings: Settings, cluster: Cluster) -> tuple[float, str]:
    own = settings.sizes.parameters * settings.trained / (settings.world if settings.stage else 1)
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
    total = (n - 1) * makespan(others) + makespan(spans)
    streams = busy(last.ops)
    optimizer, _ = optimizer_seconds(settings, cluster)
    forward = makespan(span for span in spans[: last.forward_ops] if span.op.stream in (COMPUTE, SP, EP))
    slowed = ((n - 1) * _slowed(others) + _slowed(spans)) / n
    exposed = total / n - streams[COMPUTE] - slowed - streams[SP] - streams[EP]
    host = 0.0 if quick else makespan(spans) - makespan(play(_scaled(last.ops, {HOST: 0.0})))
    return StepTime(
        total / n, forward, exposed, max(0.0, host), slowed, optimizer, total + optimizer, streams, last, spans
    )


def _scaled(ops: Iterable[Op], factors: Mapping[str, float]) -> list[Op]:
    """Operations that take so many times as long, by stream."""
    return [replace(op, seconds=op.seconds * factors.get(op.stream, 1.0)) for op in ops]


def _slowed(spans: list[Span]) -> float:
    return max(0.0, sum(span.end - span.start - span.op.seconds for span in spans if span.op.stream == COMPUTE))


def step_seconds(settings: Settings, cluster: Cluster, time: StepTime, other: Cluster, kernels: float) -> float:
    """A step's seconds on a cluster of other rates, kernels `kernels` times as slow: the same schedule played again."""
    network = "nccl_inter_node_gb_s" if settings.nodes > 1 else "nccl_intra_node_gb_s"
    exchange = "nccl_inter_node_gb_s" if settings.sp > settings.gpus else "exchange_intra_node_gb_s"
    travel = "nccl_inter_node_gb_s" if settings.ep > settings.gpus else "exchange_intra_node_gb_s"
    rates = {GATHER: network, SP: exchange, EP: travel, TO_HOST: "pcie_out_gb_s", FROM_HOST: "pcie_in_gb_s"}
    factors = {stream: getattr(cluster, name) / getattr(other, name) for stream, name in rates.items()}
    factors |= {COMPUTE: kernels, CAST: kernels}
    ratio = makespan(play(_scaled(time.schedule.ops, factors))) / makespan(time.spans)
    optimizer, _ = optimizer_seconds(settings, other)
    return settings.accumulate * time.micro * ratio + optimizer * (1.0 if settings.offload_optimizer else kernels)


def save_stall(settings: Settings, cluster: Cluster) -> float:
    """Seconds that training stands still for one save: the copy to host memory, or the whole write."""
    nbytes = checkpoint_bytes(settings) / settings.world
    if settings.async_save:
        return nbytes / (ORDINARY_COPY_GB_S * 1e9)
    return nbytes * settings.gpus / (cluster.disk_write_gb_s * 1e9)


def write_seconds(settings: Settings, cluster: Cluster) -> float:
    return checkpoint_bytes(settings) / settings.nodes / (cluster.disk_write_gb_s * 1e9)


def load_seconds(settings: Settings, cluster: Cluster) -> float:
    """Reading the base weights in BF16, every byte once in the cluster."""
    return 2 * settings.sizes.parameters / settings.nodes / (cluster.disk_read_gb_s * 1e9)


def export_seconds(settings: Settings, cluster: Cluster) -> float:
    """Writing BF16 weights from the running job, all nodes at once."""
    return 2 * settings.sizes.parameters / settings.nodes / (cluster.disk_write_gb_s * 1e9)


def sp_bytes(settings: Settings) -> float:
    """That a rank receives in a micro-step: latents and outputs, forward, recomputed and backward."""
    s, sizes = settings, settings.sizes
    a_token = sizes.latents * (s.sp - 1) + sizes.num_attention_heads * sizes.v_head_dim * (s.sp - 1) / s.sp
    times = 3 if s.activation_checkpointing else 2
    return times * sizes.layers * s.tokens * a_token * s.param_bytes


def ep_bytes(settings: Settings, work: Work) -> float:
    """That the busiest rank receives of tokens, sums and gradients in a micro-step: twice forward, thrice backward."""
    s, sizes = settings, settings.sizes
    moe = sizes.layers - min(sizes.layers, sizes.first_k_dense_replace)
    rows = s.tokens * work.reach * work.imbalance * (s.ep - 1) / s.ep
    return 5 * moe * rows * sizes.hidden_size * s.param_bytes


def network_bytes(settings: Settings, time: StepTime) -> float:
    """Of ZeRO, a micro-step: what a rank receives and sends."""
    done, b = time.schedule, settings.param_bytes
    whole = (settings.world - 1) / settings.world * (b * done.gathered + 4 * done.reduced)
    shared = (settings.holders - 1) / settings.holders * (b * done.shared_gathered + 4 * done.shared_reduced)
    return whole + shared - 2 * done.halved * (settings.holders - 1) / settings.holders


def busiest(time: StepTime) -> str:
    """What a micro-step waits for most."""
    if time.exposed < 0.05 * time.micro:
        return "compute"
    if time.host > time.exposed / 2:
        return HOST
    others = {name: seconds for name, seconds in time.streams.items() if name not in (COMPUTE, SP, EP, HOST)}
    name = max(others, key=lambda stream: others[stream])
    return "ZeRO's network" if name == GATHER else name
