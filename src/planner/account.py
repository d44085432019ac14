"""Memory and disk: the lines of the account, each with its formula."""

from collections import Counter

from src.models.deepseek_v3.sizes import small_parameters
from src.planner.ledger import GRADIENTS, INPUTS, KEPT, LAYER, LOSS, SHARDS, Line
from src.planner.schedule import Schedule
from src.planner.settings import Settings
from src.planner.work import Work
from src.units import GIB, counted

# Assumed, since nothing here has measured them on many nodes: what the driver takes for a process, NCCL's channels and
# buffers for the world's group and for the SP group, and the part of what is allocated that lies between blocks.
CONTEXT, NCCL_WORLD, NCCL_SP, FRAGMENTATION = 0.6 * GIB, 1.2 * GIB, 0.5 * GIB, 0.05
# Plain host memory of a rank with its libraries, with CUDA's and without, and of a loader's process. On four H100s a
# rank with two loaders took 2.4 GiB; what NCCL pins for many nodes comes to that.
PROCESS, CPU_PROCESS, WORKER = 4 * GIB, 0.7 * GIB, 0.8 * GIB
DISK_HEADERS = 1.001
AT_START, IN_FIRST_STEP, AT_FIRST_SAVE = "at the start", "in the first micro-step", "at the first save"


def _g(value: float) -> str:
    return f"{value / 1e9:.3f}e9"


def states(settings: Settings) -> list[Line]:
    """What lies on the device between steps."""
    s, own = settings, settings.partition
    each = "parameters" if s.stage < 3 else f"parameters / {counted(s.world, 'rank')}"
    lines = []
    if not s.offload_parameters:
        name = f"{'bf16' if s.param_bytes == 2 else 'fp32'} weights{', partitions' if s.stage == 3 else ''}"
        why = f"{_g(s.sizes.parameters)} {each} x {s.param_bytes} bytes"
        lines.append(Line(name, own * s.param_bytes, why))
    if not s.offload_optimizer:
        trained = s.sizes.parameters * s.trained / (s.world if s.stage else 1)
        master = 12 if s.param_bytes == 2 else 8  # in fp32 the weights are their own masters
        what = "fp32 master and two moments" if master == 12 else "two moments"
        of = f"{_g(s.sizes.parameters * s.trained)} trained / {counted(s.world if s.stage else 1, 'rank')}"
        lines.append(Line(what, master * trained, f"{of} x {master} bytes"))
        lines.append(Line("accumulated gradient, fp32", 4 * trained, f"{of} x 4 bytes"))
    if s.stage == 3:
        layers, small = s.sizes.num_hidden_layers, sum(small_parameters(s.sizes).values())
        kept = s.param_bytes * (layers * small + s.sizes.hidden_size)
        lines.append(Line("norms, whole", kept, f"{counted(layers, 'layer')} x {small:,} x {s.param_bytes} bytes"))
    if s.stage in (1, 2):
        why = f"reduce_bucket_size {s.reduce_bucket:,} x 4 bytes"
        lines.append(Line("reduction bucket, fp32", 4 * s.reduce_bucket, why))
    return lines


def allocated(settings: Settings, schedule: Schedule) -> tuple[list[Line], str]:
    """What torch.cuda.max_memory_allocated counts, and when: the micro-step's worst moment, or the optimizer's step."""
    held = states(settings)
    ledger = schedule.ledger
    stepping = _optimizer_step(settings)
    if stepping.nbytes > ledger.peak:
        return [*held, stepping], "optimizer step"
    lines = []
    for group in (SHARDS, GRADIENTS, INPUTS, KEPT, LAYER, LOSS):
        items = [item for item in ledger.at_peak.values() if item.name == group]
        if items:
            count = Counter(item.why for item in items)
            size = {item.why: count[item.why] * item.nbytes for item in items}
            largest = sorted(count, key=lambda why: -size[why])
            why = " + ".join(f"{count[w]} x ({w})" if count[w] > 1 else f"({w})" for w in largest)
            lines.append(Line(group, sum(item.nbytes for item in items), why))
    return [*held, *lines], ledger.moment


def _optimizer_step(settings: Settings) -> Line:
    if settings.offload_optimizer or settings.stage < 3:
        return Line("optimizer step", 0.0, "on the host")
    own = settings.partition * settings.trained
    return Line("optimizer step", 4 * own, f"{_g(own)} x 4 bytes: the gradient, flattened")


def overhead(settings: Settings, nbytes: float) -> list[Line]:
    """What is not in torch's count: assumed, see the constants."""
    lines = [
        Line("fragmentation", FRAGMENTATION * nbytes, f"{FRAGMENTATION:.0%} of {nbytes / GIB:.1f} GiB"),
        Line("CUDA context", CONTEXT, "assumed"),
    ]
    if settings.world > 1:
        two = settings.halves and 1 < settings.holders_per_node < settings.holders
        others = (settings.sp > 1) + 2 * (settings.ep > 1) + 2 * two
        shared = ", as much each of the two of shared experts" if settings.ep > 1 else ""
        shared += ", of the two of reduce_dtype bf16" if two else ""
        why = f"assumed: {NCCL_WORLD / GIB} GiB the world's group, {NCCL_SP / GIB} GiB SP's{shared}"
        lines.append(Line("NCCL", NCCL_WORLD + others * NCCL_SP, why))
    return lines


def host(settings: Settings, work: Work) -> list[Line]:
    """Host memory of a node."""
    s, ranks = settings, settings.gpus
    own, trained = s.partition, s.partition * s.trained
    lines = []
    if s.offload_optimizer:
        why = f"{counted(ranks, 'rank')} x {_g(trained)} x 16 bytes: master and gradient (pinned), two moments, in fp32"
        lines.append(Line("optimizer states and gradient", ranks * 16 * trained, why, AT_START))
    if s.offload_parameters:
        why = f"{counted(ranks, 'rank')} x {_g(own)} x {s.param_bytes} bytes"
        lines.append(Line("weights, pinned", ranks * s.param_bytes * own, why, AT_START))
    if s.activation_checkpointing:
        layers = s.sizes.layers
        waiting = {"attention outputs": s.attention_output, "layer inputs": s.layer_input}
        for (name, kept), line in zip(waiting.items(), (work.kept_output(), work.layer_input()), strict=True):
            if kept == "offload":
                of_layer = f"{line.nbytes / GIB:.2f} GiB ({line.why})"
                why = f"{counted(ranks, 'rank')} x {counted(layers, 'layer')} x {of_layer}, of the longest row"
                lines.append(Line(f"{name}, pinned", ranks * layers * line.nbytes, why, IN_FIRST_STEP))
    if s.async_save:
        each = 12 if s.param_bytes == 2 else 8 + s.param_bytes
        why = f"{counted(ranks, 'rank')} x {_g(trained)} x {each} bytes, {AT_FIRST_SAVE} and kept"
        lines.append(Line("copy written by a save, pageable", ranks * each * trained, why, AT_FIRST_SAVE))
    loaders = counted(s.num_workers, "worker")
    process = CPU_PROCESS if s.cpu else PROCESS
    why = f"{counted(ranks, 'rank')} x ({process / GIB:.1f} GiB + {loaders} x {WORKER / GIB} GiB), assumed"
    lines.append(Line("processes and loaders", ranks * (process + s.num_workers * WORKER), why, AT_START))
    return lines


def checkpoint_bytes(settings: Settings) -> float:
    """fp32 master and two moments of what is trained; frozen weights besides."""
    s = settings.sizes.parameters
    return DISK_HEADERS * (12 * s * settings.trained + settings.param_bytes * s * (1 - settings.trained))


def disk(settings: Settings) -> list[Line]:
    one = checkpoint_bytes(settings)
    kept = settings.keep + 1
    export = 2 * settings.sizes.parameters
    lines = [
        Line(
            f"checkpoints: {settings.keep} kept and the one being written",
            kept * one,
            f"{kept} x {one / 1e12:.3f} TB, {_g(settings.sizes.parameters * settings.trained)} trained x 12 bytes",
        ),
    ]
    if settings.weights_kept:
        many = settings.weights_kept + 1
        why = f"{many} x {export / 1e12:.3f} TB, {_g(settings.sizes.parameters)} x 2 bytes"
        name = f"weights, BF16: {settings.weights_kept} kept and the one being written"
        lines.append(Line(name, many * export, why))
    if settings.export:
        lines.append(Line("export at the end, BF16", export, f"{_g(settings.sizes.parameters)} x 2 bytes"))
    return lines
