"""Memory and disk: the lines of the account, each with its formula."""

from collections import Counter

from src.models.deepseek_v3.sizes import small_parameters
from src.planner.ledger import GROUPS, Line, total
from src.planner.settings import Settings
from src.planner.streams import Schedule
from src.planner.tensors import Tensors
from src.units import GIB, counted

# Assumed, as they were never measured on many nodes: what the driver takes per process, NCCL's channels and buffers of
# the world's group and of the SP group, and the part of the allocation that lies between blocks.
CONTEXT, NCCL_WORLD, NCCL_SP, FRAGMENTATION = 0.6 * GIB, 1.2 * GIB, 0.5 * GIB, 0.05
# Plain host memory of a rank with its libraries, with CUDA's and without, and of a loader's process. On four H100s a
# rank with two loaders took 2.4 GiB; on many nodes NCCL pins more.
PROCESS, CPU_PROCESS, WORKER = 4 * GIB, 0.7 * GIB, 0.8 * GIB
DISK_HEADERS = 1.001
AT_START, IN_FIRST_STEP, AT_FIRST_SAVE = "at the start", "in the first micro-step", "at the first save"


def billions(value: float) -> str:
    return f"{value / 1e9:.3f}e9"


def states(settings: Settings) -> list[Line]:
    """What lies on the device between steps."""
    s, b, parameters = settings, settings.param_bytes, settings.sizes.parameters
    lines = []
    if not s.offload_parameters:
        name = f"{'bf16' if b == 2 else 'fp32'} weights{', partitions' if s.stage == 3 else ''}"
        each = "parameters" if s.stage < 3 else f"parameters / {counted(s.world, 'rank')}"
        lines.append(Line(name, s.partition * b, f"{billions(parameters)} {each} x {b} bytes"))
    if not s.offload_optimizer:
        of = f"{billions(parameters * s.trained)} trained / {counted(s.world if s.stage else 1, 'rank')}"
        # In fp32 the weights are their own masters.
        adam = ("fp32 master and two moments", 12) if b == 2 else ("two moments", 8)
        for name, nbytes in (adam, ("accumulated gradient, fp32", 4)):
            lines.append(Line(name, nbytes * s.stepped, f"{of} x {nbytes} bytes"))
    if s.stage == 3:
        layers, small = s.sizes.num_hidden_layers, sum(small_parameters(s.sizes).values())
        why = f"{counted(layers, 'layer')} x {small:,} x {b} bytes"
        lines.append(Line("norms, whole", b * (layers * small + s.sizes.hidden_size), why))
    if s.stage in (1, 2):
        why = f"reduce_bucket_size {s.reduce_bucket:,} x 4 bytes"
        lines.append(Line("reduction bucket, fp32", 4 * s.reduce_bucket, why))
    return lines


def allocated(settings: Settings, schedule: Schedule) -> tuple[list[Line], str]:
    """What torch.cuda.max_memory_allocated counts, and when: the micro-step's worst moment, or the optimizer's step."""
    lines, ledger = states(settings), schedule.ledger
    flattened = 0.0
    if settings.stage == 3 and not settings.offload_optimizer:
        flattened = 4 * settings.stepped
    if flattened > ledger.peak:
        why = f"{billions(settings.stepped)} x 4 bytes: the gradient, flattened"
        return [*lines, Line("optimizer step", flattened, why)], "optimizer step"
    for group in GROUPS:
        items = [item for item in ledger.at_peak.values() if item.name == group]
        if items:
            count = Counter(item.why for item in items)
            size = {item.why: count[item.why] * item.nbytes for item in items}
            largest = sorted(count, key=lambda why: -size[why])
            why = " + ".join(f"{count[w]} x ({w})" if count[w] > 1 else f"({w})" for w in largest)
            lines.append(Line(group, total(items), why))
    return lines, ledger.moment


def overhead(settings: Settings, nbytes: float) -> list[Line]:
    """What is not in torch's count: assumed, see the constants."""
    lines = [
        Line("fragmentation", FRAGMENTATION * nbytes, f"{FRAGMENTATION:.0%} of {nbytes / GIB:.1f} GiB"),
        Line("CUDA context", CONTEXT, "assumed"),
    ]
    if settings.world > 1:
        others = (settings.sp > 1) + 2 * (settings.ep > 1) + 2 * settings.two_exchanges
        shared = ", as much each of the two of shared experts" if settings.ep > 1 else ""
        shared += ", of the two of reduce_dtype bf16" if settings.two_exchanges else ""
        why = f"assumed: {NCCL_WORLD / GIB} GiB the world's group, {NCCL_SP / GIB} GiB SP's{shared}"
        lines.append(Line("NCCL", NCCL_WORLD + others * NCCL_SP, why))
    return lines


def host(settings: Settings) -> list[Line]:
    """Host memory of a node."""
    s, b, tensors, lines = settings, settings.param_bytes, Tensors(settings), list[Line]()
    ranks = counted(s.gpus, "rank")

    def states(name: str, elements: float, each: int, what: str, when: str) -> None:
        why = f"{ranks} x {billions(elements)} x {each} bytes{what}"
        lines.append(Line(name, s.gpus * each * elements, why, when))

    if s.offload_optimizer:
        what = ": master and gradient (pinned), two moments, in fp32"
        states("optimizer states and gradient", s.stepped, 16, what, AT_START)
    if s.offload_parameters:
        states("weights, pinned", s.partition, b, "", AT_START)
    if s.activation_checkpointing:
        layers = s.sizes.layers
        for name, place, line in (
            ("attention outputs, pinned", s.attention_output, tensors.kept_output),
            ("layer inputs, pinned", s.layer_input, tensors.layer_input),
        ):
            if place == "offload":
                of_layer = f"{line.nbytes / GIB:.2f} GiB ({line.why})"
                why = f"{ranks} x {counted(layers, 'layer')} x {of_layer}, of the longest row"
                lines.append(Line(name, s.gpus * layers * line.nbytes, why, IN_FIRST_STEP))
    if s.async_save:
        what, each = f", {AT_FIRST_SAVE} and kept", 12 if b == 2 else 8 + b
        states("copy written by a save, pageable", s.stepped, each, what, AT_FIRST_SAVE)
    process, loaders = CPU_PROCESS if s.cpu else PROCESS, counted(s.num_workers, "worker")
    why = f"{ranks} x ({process / GIB:.1f} GiB + {loaders} x {WORKER / GIB} GiB), assumed"
    lines.append(Line("processes and loaders", s.gpus * (process + s.num_workers * WORKER), why, AT_START))
    return lines


def checkpoint_bytes(settings: Settings) -> float:
    """fp32 master and two moments of what is trained; frozen weights besides."""
    s = settings.sizes.parameters
    return DISK_HEADERS * (12 * s * settings.trained + settings.param_bytes * s * (1 - settings.trained))


def export_bytes(settings: Settings) -> int:
    """The weights in BF16."""
    return 2 * settings.sizes.parameters


def disk(settings: Settings) -> list[Line]:
    s, parameters, lines = settings, settings.sizes.parameters, list[Line]()

    def kept(name: str, keep: int, one: float, of: str) -> None:
        why = f"{keep + 1} x {one / 1e12:.3f} TB, {of}"
        lines.append(Line(f"{name}: {keep} kept and the one being written", (keep + 1) * one, why))

    kept("checkpoints", s.keep, checkpoint_bytes(s), f"{billions(parameters * s.trained)} trained x 12 bytes")
    if s.weights_kept:
        kept("weights, BF16", s.weights_kept, export_bytes(s), f"{billions(parameters)} x 2 bytes")
    if s.export:
        lines.append(Line("export at the end, BF16", export_bytes(s), f"{billions(parameters)} x 2 bytes"))
    return lines
