"""Our prediction beside each row that the public guide reports: writes the tables of docs/planning.md anew, and
the one of measured runs in benchmarks/RESULTS.md.

    python -m benchmarks.plan_guide

Each row takes the fastest of our three ways to keep activations that fits: attention's outputs in host memory or
computed again, layers' inputs on the device or in host memory.
"""

from pathlib import Path

from benchmarks import plan_check
from benchmarks.plan_check import LINES
from src.models.deepseek_v3.sizes import read_sizes
from src.planner.cluster import Cluster
from src.planner.plan import Data, Plan, make_plan
from src.planner.settings import GIB, Settings

MODEL = "configs/models/deepseek-v3"
# nodes, SP, optimizer in host memory, batch, what the guide reports
ROWS = [
    (16, 8, True, 2, "~30 GB"),
    (32, 8, True, 1, "~32 GB"),
    (32, 4, True, 1, "~25 GB"),
    (32, 1, True, 1, "~30 GB"),
    (32, 4, True, 2, "~74 GB, recommended"),
    (32, 1, True, 2, "out of memory"),
    (32, 4, False, 1, "out of memory"),
    (32, 1, False, 1, "out of memory"),
]
KEPT = [("offload", "keep"), ("recompute", "keep"), ("offload", "offload"), ("recompute", "offload")]


def plan_row(nodes: int, sp: int, offload: bool, batch: int, mtp: bool = True, **changes: object) -> Plan:
    """The fastest of KEPT that fits; where none does, the one that needs the least of a GPU."""
    plans = []
    for output, layer_input in KEPT:
        settings = Settings(
            read_sizes(MODEL, None, mtp),
            nodes,
            8,
            sp,
            offload_optimizer=offload,
            batch_size=batch,
            accumulate=4,
            attention_output=output,
            layer_input=layer_input,
            num_workers=4,
        ).but(**changes)
        rows = Data(100_000, 100_000 * settings.max_length, 1, "100,000 full rows")
        plans.append(make_plan(settings, Cluster(), rows, quick=True))
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        best = max(fitting, key=lambda plan: plan.rate())
        return make_plan(best.settings, best.cluster, best.data)
    return min(plans, key=lambda plan: (plan.host_total > plan.host_room, plan.device_total))


def guide_table() -> list[str]:
    lines = [
        "| nodes | SP | optimizer | batch | the guide | ours: GiB a GPU | host GiB | attention outputs, layer inputs "
        "| s a step of 4 | tokens/s/GPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for nodes, sp, offload, batch, reported in ROWS:
        plan = plan_row(nodes, sp, offload, batch)
        s = plan.settings
        place = "host" if offload else "GPU"
        times = f"{plan.time.step:.0f} ({plan.fastest:.0f} to {plan.slowest:.0f}) | {plan.rate():.0f}"
        lines.append(
            f"| {nodes} | {sp} | {place} | {batch} | {reported} | "
            f"{'' if plan.fits else 'does not fit: '}{plan.device_total / GIB:.1f} | {plan.host_total / GIB:.0f} | "
            f"{s.attention_output}, {s.layer_input} | {times if plan.fits else ' | '} |"
        )
    return lines


# Published figures at 4k tokens: Megatron Core and NeMo, DeepSeek-V3 on H100, tokens/s/GPU (docs/planning.md).
AT_4K = [(32, 1, 4), (32, 1, 8), (32, 1, 16), (128, 1, 4), (128, 1, 8), (128, 1, 16)]


def table_4k() -> list[str]:
    lines = [
        "| GPUs | tokens a GPU and micro-step | GiB a GPU | tokens/s/GPU | MFU | compute waits |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for nodes, sp, batch in AT_4K:
        plan = plan_row(nodes, sp, nodes < 128, batch, mtp=False, max_length=4096, document=4096)
        rates = f"{plan.rate(plan.slowest):.0f} to {plan.rate(plan.fastest):.0f}"
        lines.append(
            f"| {plan.settings.world} | {plan.settings.tokens:,} | "
            f"{'' if plan.fits else 'does not fit: '}{plan.device_total / GIB:.1f} | {plan.rate():.0f} ({rates}) | "
            f"{plan.mfu():.1%} | {plan.time.exposed / plan.time.micro:.0%} |"
        )
    return lines


PAGES = [Path("docs/planning.md"), Path("benchmarks/RESULTS.md")]


def tables() -> dict[str, list[str]]:
    return {"guide": guide_table(), "4k": table_4k(), "measured": plan_check.table(plan_check.read_lines(LINES))}


def with_tables(page: str, new: dict[str, list[str]]) -> str:
    """The page with those of the tables that it has written anew."""
    for mark, table in new.items():
        if f"<!-- {mark} -->\n" in page:
            before, rest = page.split(f"<!-- {mark} -->\n")
            after = rest.split(f"<!-- /{mark} -->")[1]
            page = f"{before}<!-- {mark} -->\n" + "\n".join(table) + f"\n<!-- /{mark} -->{after}"
    return page


if __name__ == "__main__":
    written = tables()
    for path in PAGES:
        path.write_text(with_tables(path.read_text(encoding="utf-8"), written), encoding="utf-8")
