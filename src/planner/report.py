"""A plan as a table that a person reads, and as JSON."""

from collections.abc import Iterable
from typing import Any

from src.planner.account import checkpoint_bytes
from src.planner.ledger import Line
from src.planner.plan import ASSUMED, MEASURED, Plan, optimizer_why, shifted, step_flops
from src.planner.search import pays_until
from src.planner.settings import Settings
from src.planner.streams import CAST, COMPUTE, EP, FROM_HOST, GATHER, HOST, SP, TO_HOST
from src.planner.timing import (
    ep_bytes,
    export_seconds,
    load_seconds,
    network_bytes,
    save_stall,
    sp_bytes,
    write_seconds,
)
from src.planner.work import Work
from src.units import GIB, counted


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


def time_lines(plan: Plan) -> list[tuple[str, str, str]]:
    """(what, how much, formula)."""
    s, t, c = plan.settings, plan.time, plan.cluster
    rows: list[tuple[str, str, str]] = []

    def add(what: str, much: str | float, why: str = "") -> None:
        rows.append((what, much if isinstance(much, str) else f"{digits(much)} s", why))

    rows_of = f"{s.batch_size} x {s.max_length:,} tokens per {counted(s.sp, 'GPU')}"
    add("micro-step, simulated", t.micro, f"{rows_of}; the mean of {s.accumulate} simulated schedules")
    add("  forward pass", t.forward)
    flops = step_flops(s) / s.sp
    again = "useful operations a GPU, and what is computed again, at the kernels' rates"
    add("  compute", t.streams[COMPUTE], f"{flops / 1e15:.2f}e15 {again}")
    bus, bandwidth = ("inter", c.nccl_inter_node_gb_s) if s.nodes > 1 else ("intra", c.nccl_intra_node_gb_s)
    sent = f"{t.schedule.gathered / 1e9:.0f}e9 weights x {s.param_bytes} bytes + {t.schedule.reduced / 1e9:.0f}e9 "
    halved = (
        f" ({t.schedule.halved / 1e9:.0f}e9 of them, of experts, x 2 bytes, by all-to-all)" if t.schedule.halved else ""
    )
    sent += f"gradients x 4 bytes{halved}, x {s.world - 1}/{s.world} = {network_bytes(s, t) / 1e12:.2f} TB"
    if s.ep > 1:
        halves = ", whose gradients are x 2 bytes" if halved else ""
        done, part = t.schedule, f"x {s.world - 1}/{s.world}"
        sent = (
            f"{network_bytes(s, t) / 1e12:.2f} TB: {part} of {done.gathered / 1e9:.0f}e9 weights x "
            f"{s.param_bytes} bytes + {done.reduced / 1e9:.0f}e9 gradients x 4 bytes; x {s.holders - 1}/{s.holders} of "
            f"{done.shared_gathered / 1e9:.0f}e9 and {done.shared_reduced / 1e9:.0f}e9 of shared experts{halves}, at "
            f"1/{min(s.ep, s.gpus)} of the rate between nodes"
        )
    add("  ZeRO's network", t.streams[GATHER], f"{sent} / {bandwidth:g} GB/s ({bus}-node)")
    if s.sp > 1:
        outputs = s.sizes.num_attention_heads * s.sizes.v_head_dim
        a_token = f"({s.sizes.latents:,} x {s.sp - 1} + {outputs:,} x {s.sp - 1}/{s.sp}) x {s.param_bytes} bytes"
        passes = f"{sp_bytes(s) / 1e9:.0f} GB; forward, again, backward: {s.tokens:,} tokens"
        add("  SP exchanges", t.streams[SP], f"{passes} x {a_token} a layer")
    if s.ep > 1:
        work = Work(s, c)
        a_token = f"{work.reach:.2f} GPUs x {s.sizes.hidden_size:,} x {s.param_bytes} bytes x {s.ep - 1}/{s.ep}"
        why = f"{ep_bytes(s, work) / 1e9:.0f} GB; 2 forward, 3 backward: {s.tokens:,} tokens x {a_token} a layer, "
        add(
            "  tokens to shared experts", t.streams[EP], f"{why}{work.imbalance} times as much at the busiest (assumed)"
        )
    add("  copies to the host", t.streams[TO_HOST], f"at {c.pcie_out_gb_s:g} GB/s")
    add("  copies from the host", t.streams[FROM_HOST], f"at {c.pcie_in_gb_s:g} GB/s")
    add("  gradients cast and summed", t.streams[CAST], "beside the computation")
    hold = "while ZeRO's collectives run, which hold multiprocessors; those take longer too"
    add("  slowdown from NCCL overlap", t.slowed, hold)
    exchanges = t.streams[SP] + t.streams[EP]
    hidden = f"{t.micro:.2f} - {t.streams[COMPUTE]:.2f} - {t.slowed:.2f} - {exchanges:.2f}"
    add("  compute stalls", t.exposed, f"{hidden}: what is not hidden")
    add("    of it for the host", t.host, f"whose hooks and launches take {t.streams[HOST]:.2f} s, most of them ahead")
    add("optimizer", t.optimizer, optimizer_why(plan))
    off = f"assumed {ASSUMED:.0%} off, others {MEASURED:.0%}"
    step = f"{digits(t.step)} s ({digits(plan.fastest)} to {digits(plan.slowest)})"
    add("step", step, f"{s.accumulate} x {t.micro:.2f} + {t.optimizer:.2f}; {off}")
    rate = f"{plan.rate():.0f} ({plan.rate(plan.slowest):.0f} to {plan.rate(plan.fastest):.0f})"
    add(
        "tokens/s per GPU",
        rate,
        f"{plan.step_tokens:,.0f} tokens per step / {counted(s.world, 'GPU')} / {digits(t.step)} s",
    )
    mfu = f"{plan.mfu():.1%} ({plan.mfu(plan.slowest):.1%} to {plan.mfu(plan.fastest):.1%})"
    useful = f"{flops * s.accumulate / 1e15:.1f}e15 useful operations a GPU"
    add(f"MFU of {c.card.peak:.0f} TFLOP/s", mfu, f"{useful} / {digits(t.step)} s / {c.card.peak:.0f}e12")
    copied = "the copy to host memory" if s.async_save else "the whole write"
    add("save stall", duration(save_stall(s, c)), copied)
    disk = f"/ {counted(s.nodes, 'node')} / {c.disk_write_gb_s:g} GB/s"
    add("  the write beside training", duration(write_seconds(s, c)), f"{checkpoint_bytes(s) / 1e12:.2f} TB {disk}")
    slow = f"{digits(plan.slowest)} + 2 x {write_seconds(s, shifted(c, True)):.0f} + 60"
    lead = f"{slow}: the slowest step, the save under way, its own, at the slowest disk"
    add("lead of a stop (--stop.lead)", f"{stop_lead(plan):.0f} s", lead)
    weights = f"{2 * s.sizes.parameters / 1e12:.2f} TB"
    read = f"{weights} in BF16 / {counted(s.nodes, 'node')} / {c.disk_read_gb_s:g} GB/s"
    add("reading the weights", duration(load_seconds(s, c)), read)
    add("export in BF16", duration(export_seconds(s, c)), f"by the job: {weights} {disk}")
    run = f"{counted(plan.steps, 'step')}, {duration(plan.wall())}"
    times = counted(plan.data.epochs or 1, "epoch")
    epochs = f"{counted(plan.data.rows, 'row')} / {s.rows_per_step} per step x {times}"
    ends = epochs if plan.data.epochs else "trainer.max_steps, epochs unbounded"
    between = f"{duration(plan.wall(plan.fastest))} to {duration(plan.wall(plan.slowest))}"
    add("run", f"{run} ({between})", f"{ends}, {counted(plan.saves, 'save')}")
    return rows


def _count(number: float) -> str:
    return f"{number / 1e9:.1f}e9" if number >= 1e8 else f"{number / 1e6:.1f}e6"


def stop_lead(plan: Plan) -> float:
    """Seconds before the end of a job's time in which `src.callbacks.stop` has to begin."""
    return plan.slowest + 2 * write_seconds(plan.settings, shifted(plan.cluster, True)) + 60


def text(plan: Plan, explain: bool = False) -> str:
    s, out = plan.settings, []
    place = "process" if s.cpu else "GPU"
    many = counted(s.world, "process", "processes") if s.cpu else counted(s.world, "GPU")
    head = f"{_count(s.sizes.parameters)} parameters on {many} ({s.nodes} x {s.gpus}): DP {s.dp} x SP {s.sp}, "
    head += f"experts shared by {s.ep}, " if s.ep > 1 else ""
    out += [head + f"{counted(s.rows_per_step, 'row')} of {s.max_length:,} per step", f"data: {plan.data.source}", ""]

    def section(title: str, lines: Iterable[Line], room: float | None, unit: float, name: str) -> None:
        lines = list(lines)
        total = sum(line.nbytes for line in lines)
        out.append(title)
        for line in lines:
            out.append(f"  {line.name:<52} {line.nbytes / unit:>9.1f} {name}")
            if explain:
                out.append(f"      = {line.why}")
        of = f" of {room / unit:.1f}" if room else ""
        out.append(f"  {'total':<52} {total / unit:>9.1f} {name}{of}")
        out.append("")

    room = None if s.cpu else plan.device_room
    section(f"A {place}'s memory, fullest at: {plan.moment}", [*plan.device, *plan.overhead], room, GIB, "GiB")
    section("Host memory of a node", plan.host, plan.host_room, GIB, "GiB")
    large = plan.disk[0].nbytes > 1e11
    section("Disk", plan.disk, None, 1e12 if large else 1e9, "TB" if large else "GB")
    if not s.cpu:
        out.append("Time")
        for what, much, why in time_lines(plan):
            out.append(f"  {what:<30} {much}")
            if explain and why:
                out.append(f"      = {why}")
        if s.uncounted:
            out.append(f"  not counted in the run's time: {', '.join(s.uncounted)}")
        assumed = [f"{name} {getattr(plan.cluster, name)}" for name in plan.cluster.assumed]
        if assumed:
            out += ["", f"Assumed (measure with `preflight --write F`, give with --cluster F): {', '.join(assumed)}"]
    out += ["", f"Limited by: {plan.binding}", plan.verdict]
    return "\n".join(out)


def as_json(plan: Plan) -> dict[str, Any]:
    def lines(items: list[Line]) -> list[dict[str, Any]]:
        return [{"name": line.name, "bytes": round(line.nbytes), "formula": line.why} for line in items]

    s, t = plan.settings, plan.time
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
        "host": {"bytes": round(plan.host_total), "room": round(plan.host_room), "lines": lines(plan.host)},
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
            "save_stall_s": save_stall(s, plan.cluster),
            "save_write_s": write_seconds(s, plan.cluster),
            "stop_lead_s": stop_lead(plan),
            "load_s": load_seconds(s, plan.cluster),
            "export_s": export_seconds(s, plan.cluster),
            "wall_s": plan.wall(),
            "formulas": {what.strip(): why for what, _, why in time_lines(plan)},
        },
        "network_bytes": {
            "zero": round(network_bytes(s, t)),
            "sp": round(sp_bytes(s)),
            "ep": round(ep_bytes(s, Work(s, plan.cluster))),
        },
        "tokens_per_s_per_gpu": plan.rate(),
        "tokens_per_s_per_gpu_range": [plan.rate(plan.slowest), plan.rate(plan.fastest)],
        "mfu": plan.mfu(),
        "steps": plan.steps,
        "rows_per_step": s.rows_per_step,
        "data": {"rows": plan.data.rows, "tokens": plan.data.tokens, "source": plan.data.source},
        "cluster": plan.cluster.values(),
        "assumed": plan.cluster.assumed,
    }


def search_text(plans: list[Plan], asked: Settings) -> str:
    """A line of figures for each and, below it, what the command line of the config is to have for it."""
    if not plans:
        return "Nothing in the grid of --search fits."
    out = ["  tokens/s per GPU    MFU  GPU GiB  host GiB   step s  rows per step"]
    for p in plans:
        figures = f"{p.rate():>18.0f} {p.mfu():>6.1%}  {p.device_total / GIB:>7.1f}  {p.host_total / GIB:>8,.0f}"
        out.append(f"{figures}  {digits(p.time.step):>7}  {p.settings.rows_per_step:>13,}")
        out.append(f"    {p.settings.arguments(asked) or '(as asked)'}")
    return "\n".join(out)


def scale_text(plans: list[Plan]) -> str:
    """What each size costs; where more rows a step than asked are needed to use all GPUs, that is said."""
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
        out.append("Each doubling makes the run at least 1.6 times as fast.")
    else:
        out.append(
            f"Scaling stops paying at {counted(best.settings.world, 'GPU')}: twice as many are less than 1.6 times "
            "as fast."
        )
    asked = min(p.settings.rows_per_step for p in plans)
    more = next((p for p in plans if p.settings.rows_per_step > 1.5 * asked), None)
    if more is not None:
        out.append(f"From {more.settings.world} GPUs on a step holds more rows than {asked:,}: another learning rate.")
    return "\n".join(out)
