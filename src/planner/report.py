"""A plan as a table that a person reads, and as JSON."""

from collections.abc import Iterable, Iterator
from typing import Any

from src.planner.account import checkpoint_bytes, export_bytes
from src.planner.cluster import ASSUMED, MEASURED
from src.planner.ledger import Line, total
from src.planner.plan import STOP_MARGIN, Plan
from src.planner.search import PAYS, pays_until
from src.planner.settings import Settings
from src.planner.streams import CAST, COMPUTE, EP, FROM_HOST, HOST, SP, TO_HOST, ZERO, received
from src.planner.timing import optimizer_seconds
from src.units import GIB, counted

TimeLine = tuple[str, str, str]  # what, how much, formula
MORE_ROWS = 1.5  # times as many rows per step as asked for: another learning rate


def digits(number: float) -> str:
    """Three digits, above 1,000 all: 0.214, 5.02, 31.1, 127, 1388."""
    if number < 1:
        return "0" if number < 0.0005 else f"{number:.3f}"
    return f"{number:.{max(0, 3 - len(str(int(number))))}f}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{digits(seconds)} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def _seconds(what: str, seconds: float, why: str = "") -> TimeLine:
    return what, f"{digits(seconds)} s", why


def time_lines(plan: Plan) -> list[TimeLine]:
    return [*_micro_step_lines(plan), *_step_lines(plan), *_run_lines(plan)]


def _micro_step_lines(plan: Plan) -> Iterator[TimeLine]:
    s, t, c = plan.settings, plan.time, plan.cluster
    rows = f"{s.batch_size} x {s.max_length:,} tokens per {counted(s.sp, 'GPU')}"
    yield _seconds("micro-step, simulated", t.micro, f"{rows}; the mean of {s.accumulate} simulated schedules")
    yield _seconds("  forward pass", t.forward)
    again = "useful operations per GPU, and what is computed again, at the kernels' rates"
    yield _seconds("  compute", t.streams[COMPUTE], f"{plan.gpu_flops / 1e15:.2f}e15 {again}")
    bandwidth = f"{getattr(c, s.zero_link):g} GB/s ({'inter' if s.nodes > 1 else 'intra'}-node)"
    yield _seconds("  ZeRO's network", t.streams[ZERO], f"{_zero_formula(plan)} / {bandwidth}")
    sent, bytes_each = t.schedule.ops, f"{s.param_bytes} bytes"
    if s.sp > 1:
        outputs = s.sizes.num_attention_heads * s.sizes.v_head_dim
        a_token = f"({s.sizes.latents:,} x {s.sp - 1} + {outputs:,} x {s.sp - 1}/{s.sp}) x {bytes_each}"
        passes = f"{received(sent, SP) / 1e9:.0f} GB; forward, again, backward: {s.tokens:,} tokens"
        yield _seconds("  SP exchanges", t.streams[SP], f"{passes} x {a_token} per layer")
    if s.ep > 1:
        a_token = f"{s.reach:.2f} GPUs x {s.sizes.hidden_size:,} x {bytes_each} x {s.ep - 1}/{s.ep}"
        passes = f"{received(sent, EP) / 1e9:.0f} GB; 2 forward, 3 backward: {s.tokens:,} tokens"
        busiest = f"{s.load} times as much at the busiest (assumed); {t.travel:.2f} s of it beside no computation"
        yield _seconds("  tokens to shared experts", t.streams[EP], f"{passes} x {a_token} per layer, {busiest}")
    yield _seconds("  copies to the host", t.streams[TO_HOST], f"at {c.pcie_out_gb_s:g} GB/s")
    yield _seconds("  copies from the host", t.streams[FROM_HOST], f"at {c.pcie_in_gb_s:g} GB/s")
    yield _seconds("  gradients cast and summed", t.streams[CAST], "beside the computation")
    hold = "while ZeRO's collectives run, which hold multiprocessors; those take longer too"
    yield _seconds("  slowdown from NCCL overlap", t.slowed, hold)
    exchanges = t.streams[SP] + t.travel
    hidden = f"{t.micro:.2f} - {t.streams[COMPUTE]:.2f} - {t.slowed:.2f} - {exchanges:.2f}"
    yield _seconds("  compute stalls", t.exposed, f"{hidden}: what is not hidden")
    ahead = f"whose hooks and launches take {t.streams[HOST]:.2f} s, most of them ahead"
    yield _seconds("    of it for the host", t.host, ahead)


def _zero_formula(plan: Plan) -> str:
    s, done = plan.settings, plan.time.schedule
    sent = f"{received(done.ops, ZERO) / 1e12:.2f} TB"
    every, own = f"x {s.world - 1}/{s.world}", f"x {s.holders - 1}/{s.holders}"
    weights, gradients = f"{done.gathered[s.world] / 1e9:.0f}e9", f"{done.reduced[s.world] / 1e9:.0f}e9"
    moved = f"{weights} weights x {s.param_bytes} bytes + {gradients} gradients x 4 bytes"
    if s.ep == 1:
        halved = f" ({done.halved / 1e9:.0f}e9 of them, of experts, x 2 bytes, by all-to-all)" if done.halved else ""
        return f"{moved}{halved}, {every} = {sent}"
    shared = f"{done.gathered[s.holders] / 1e9:.0f}e9 and {done.reduced[s.holders] / 1e9:.0f}e9 of shared experts"
    halved = ", whose gradients are x 2 bytes" if done.halved else ""
    rate = f"at 1/{min(s.ep, s.gpus)} of the rate between nodes"
    return f"{sent}: {every} of {moved}; {own} of {shared}{halved}, {rate}"


def _step_lines(plan: Plan) -> Iterator[TimeLine]:
    s, t = plan.settings, plan.time
    yield _seconds("optimizer", *optimizer_seconds(s, plan.cluster))
    off = f"assumed {ASSUMED:.0%} off, others {MEASURED:.0%}"
    step = f"{digits(t.step)} s ({digits(plan.fastest)} to {digits(plan.slowest)})"
    yield "step", step, f"{s.accumulate} x {t.micro:.2f} + {t.optimizer:.2f}; {off}"
    rate = f"{plan.rate():.0f} ({plan.rate(plan.slowest):.0f} to {plan.rate(plan.fastest):.0f})"
    tokens = f"{plan.step_tokens:,.0f} tokens per step / {counted(s.world, 'GPU')} / {digits(t.step)} s"
    yield "tokens/s per GPU", rate, tokens
    mfu = f"{plan.mfu():.1%} ({plan.mfu(plan.slowest):.1%} to {plan.mfu(plan.fastest):.1%})"
    useful = f"{plan.gpu_flops * s.accumulate / 1e15:.1f}e15 useful operations per GPU"
    peak = f"{plan.cluster.card.peak:.0f}"
    yield f"MFU of {peak} TFLOP/s", mfu, f"{useful} / {digits(t.step)} s / {peak}e12"


def _run_lines(plan: Plan) -> Iterator[TimeLine]:
    s, c, data = plan.settings, plan.cluster, plan.data
    copied = "the copy to host memory" if s.async_save else "the whole write"
    yield "save stall", duration(plan.save_stall), copied
    nodes = f"/ {counted(s.nodes, 'node')} /"
    written, weights = f"{checkpoint_bytes(s) / 1e12:.2f} TB", f"{export_bytes(s) / 1e12:.2f} TB"
    disk = f"{nodes} {c.disk_write_gb_s:g} GB/s"
    yield "  the write beside training", duration(plan.write_seconds()), f"{written} {disk}"
    slow = f"{digits(plan.slowest)} + 2 x {plan.slowest_write:.0f} + {STOP_MARGIN}"
    lead = f"{slow}: the slowest step, the save under way, its own, at the slowest disk"
    yield "lead of a stop (--stop.lead)", f"{plan.stop_lead:.0f} s", lead
    read = f"{weights} in BF16 {nodes} {c.disk_read_gb_s:g} GB/s"
    yield "reading the weights", duration(plan.load_seconds), read
    yield "export in BF16", duration(plan.export_seconds), f"by the job: {weights} {disk}"
    run = f"{counted(plan.steps, 'step')}, {duration(plan.wall())}"
    between = f"{duration(plan.wall(plan.fastest))} to {duration(plan.wall(plan.slowest))}"
    ends = "trainer.max_steps, epochs unbounded"
    if data.epochs:
        ends = f"{counted(data.rows, 'row')} / {s.rows_per_step} per step x {counted(data.epochs, 'epoch')}"
    yield "run", f"{run} ({between})", f"{ends}, {counted(plan.saves, 'save')}"


def _count(number: float) -> str:
    return f"{number / 1e9:.1f}e9" if number >= 1e8 else f"{number / 1e6:.1f}e6"


def _section(title: str, lines: list[Line], room: float | None, unit: float, name: str, explain: bool) -> Iterator[str]:
    yield title
    for line in lines:
        yield f"  {line.name:<52} {line.nbytes / unit:>9.1f} {name}"
        if explain:
            yield f"      = {line.why}"
    of = f" of {room / unit:.1f}" if room else ""
    yield f"  {'total':<52} {total(lines) / unit:>9.1f} {name}{of}"
    yield ""


def text(plan: Plan, explain: bool = False) -> str:
    s, c = plan.settings, plan.cluster
    place = "process" if s.cpu else "GPU"
    many = counted(s.world, "process", "processes") if s.cpu else counted(s.world, "GPU")
    head = f"{_count(s.sizes.parameters)} parameters on {many} ({s.nodes} x {s.gpus}): DP {s.dp} x SP {s.sp}, "
    head += f"experts shared by {s.ep}, " if s.ep > 1 else ""
    out = [f"{head}{counted(s.rows_per_step, 'row')} of {s.max_length:,} per step", f"data: {plan.data.source}", ""]
    large = plan.disk[0].nbytes > 1e11
    for title, lines, room, unit, name in (
        (
            f"A {place}'s memory, fullest at: {plan.moment}",
            [*plan.device, *plan.overhead],
            None if s.cpu else plan.device_room,
            GIB,
            "GiB",
        ),
        ("Host memory of a node", plan.host, c.host_room, GIB, "GiB"),
        ("Disk", plan.disk, None, 1e12 if large else 1e9, "TB" if large else "GB"),
    ):
        out += _section(title, lines, room, unit, name, explain)
    if not s.cpu:
        out.append("Time")
        for what, much, why in time_lines(plan):
            out.append(f"  {what:<30} {much}")
            if explain and why:
                out.append(f"      = {why}")
        if s.uncounted:
            out.append(f"  not counted in the run's time: {', '.join(s.uncounted)}")
        if assumed := ", ".join(f"{name} {getattr(c, name)}" for name in c.assumed):
            out += ["", f"Assumed (measure with `preflight --write F`, give with --cluster F): {assumed}"]
    return "\n".join([*out, "", f"Limited by: {plan.binding}", plan.verdict])


def as_json(plan: Plan) -> dict[str, Any]:
    def lines(items: Iterable[Line]) -> list[dict[str, Any]]:
        return [{"name": line.name, "bytes": round(line.nbytes), "formula": line.why} for line in items]

    s, t, c = plan.settings, plan.time, plan.cluster
    return {
        "fits": plan.fits,
        "verdict": plan.verdict,
        "binding": plan.binding,
        "device": {
            "bytes": round(plan.device_total),
            "room": round(plan.device_room),
            "allocated": round(plan.allocated),
            "moment": plan.moment,
            "lines": lines([*plan.device, *plan.overhead]),
        },
        "host": {"bytes": round(plan.host_total), "room": round(c.host_room), "lines": lines(plan.host)},
        "disk": {"lines": lines(plan.disk)},
        "time": {
            "micro_step_s": t.micro,
            "exposed_s": t.exposed,
            "host_s": t.host,
            "slowed_s": t.slowed,
            "optimizer_s": t.optimizer,
            "step_s": t.step,
            "step_s_range": [plan.fastest, plan.slowest],
            "streams_s": t.streams,
            "save_stall_s": plan.save_stall,
            "save_write_s": plan.write_seconds(),
            "stop_lead_s": plan.stop_lead,
            "load_s": plan.load_seconds,
            "export_s": plan.export_seconds,
            "wall_s": plan.wall(),
            "formulas": {what.strip(): why for what, _, why in time_lines(plan)},
        },
        "network_bytes": {
            name: round(received(t.schedule.ops, stream)) for name, stream in (("zero", ZERO), ("sp", SP), ("ep", EP))
        },
        "tokens_per_s_per_gpu": plan.rate(),
        "tokens_per_s_per_gpu_range": [plan.rate(plan.slowest), plan.rate(plan.fastest)],
        "mfu": plan.mfu(),
        "steps": plan.steps,
        "rows_per_step": s.rows_per_step,
        "data": {"rows": plan.data.rows, "tokens": plan.data.tokens, "source": plan.data.source},
        "cluster": c.values(),
        "assumed": c.assumed,
    }


def search_text(plans: list[Plan], asked: Settings) -> str:
    """A line of figures for each and, below it, the arguments that change the asked config to it."""
    if not plans:
        return "Nothing in the grid of --search fits."
    out = ["  tokens/s per GPU    MFU  GPU GiB  host GiB   step s  rows per step"]
    for p in plans:
        figures = f"{p.rate():>18.0f} {p.mfu():>6.1%}  {p.device_total / GIB:>7.1f}  {p.host_total / GIB:>8,.0f}"
        out.append(f"{figures}  {digits(p.time.step):>7}  {p.settings.rows_per_step:>13,}")
        out.append(f"    {p.settings.arguments(asked) or '(as asked)'}")
    return "\n".join(out)


def scale_text(plans: list[Plan]) -> str:
    """What each size costs, where scaling stops paying, and from which size a step has more rows than asked."""
    out = ["  GPUs  fits  GPU GiB  host GiB  rows per step   step s  tokens/s per GPU  GPU-hours per 1B tokens  run"]
    for p in plans:
        hours = 1e9 / p.rate() / 3600
        out.append(
            f"{p.settings.world:>6}  {'yes' if p.fits else 'no':>4}  {p.device_total / GIB:>7.1f}  "
            f"{p.host_total / GIB:>8,.0f}  {p.settings.rows_per_step:>13,}  {p.time.step:>7.1f}  "
            f"{p.rate():>16.0f}  {hours:>23.0f}  {duration(p.wall())}"
        )
    best = pays_until(plans)
    if best is None:
        return "\n".join([*out, "No size fits."])
    cheapest = max((p for p in plans if p.fits), key=lambda p: p.rate())
    out.append(f"Cheapest per token: {counted(cheapest.settings.world, 'GPU')}.")
    if best is plans[-1]:
        out.append(f"Each doubling makes the run at least {PAYS} times as fast.")
    else:
        stops = f"Scaling stops paying at {counted(best.settings.world, 'GPU')}"
        out.append(f"{stops}: twice as many are less than {PAYS} times as fast.")
    asked = min(p.settings.rows_per_step for p in plans)
    more = next((p for p in plans if p.settings.rows_per_step > MORE_ROWS * asked), None)
    if more is not None:
        out.append(f"From {more.settings.world} GPUs on a step holds more rows than {asked:,}: another learning rate.")
    return "\n".join(out)
