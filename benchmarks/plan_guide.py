"""Writes what the planner says into the pages that quote it: the tables of docs/planning.md, the plan in
docs/overview.md, the table of measured runs in benchmarks/RESULTS.md and the verdict in the head of each config.

    python -m benchmarks.plan_guide

Each row of the guide takes the fastest of our ways to keep activations that fits: attention's outputs in host memory or
computed again, layers' inputs on the device or in host memory.
"""

import re
from pathlib import Path

from benchmarks import plan_check
from benchmarks.markdown import markdown
from benchmarks.plan_check import LINES
from src.commands.plan import plan_file, verdict
from src.models.deepseek_v3.sizes import read_sizes
from src.planner.cluster import Cluster
from src.planner.plan import Data, Plan, make_plan
from src.planner.report import scale_text, text
from src.planner.search import scale
from src.planner.settings import Settings
from src.units import GIB

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
    return min(plans, key=lambda plan: (plan.host_total > plan.cluster.host_room, plan.device_total))


def _gib(plan: Plan) -> str:
    return f"{'' if plan.fits else 'does not fit: '}{plan.device_total / GIB:.1f}"


def guide_table() -> list[str]:
    columns = (
        "nodes | SP | optimizer | batch | the guide | ours: GiB per GPU | host GiB | attention outputs, layer inputs "
        "| s per step of 4 | tokens/s per GPU"
    )
    rows = []
    for nodes, sp, offload, batch, reported in ROWS:
        plan = plan_row(nodes, sp, offload, batch)
        asked = [str(nodes), str(sp), "host" if offload else "GPU", str(batch), reported]
        kept = f"{plan.settings.attention_output}, {plan.settings.layer_input}"
        times = [f"{plan.time.step:.0f} ({plan.fastest:.0f} to {plan.slowest:.0f})", f"{plan.rate():.0f}"]
        rows.append([*asked, _gib(plan), f"{plan.host_total / GIB:.0f}", kept, *(times if plan.fits else ["", ""])])
    return markdown(columns.split(" | "), rows)


# Published figures at 4k tokens: Megatron Core and NeMo, DeepSeek-V3 on H100, tokens/s per GPU (docs/planning.md).
AT_4K = [(32, 1, 4), (32, 1, 8), (32, 1, 16), (128, 1, 4), (128, 1, 8), (128, 1, 16)]


def table_4k() -> list[str]:
    columns = "GPUs | tokens per GPU and micro-step | GiB per GPU | tokens/s per GPU | MFU | compute waits"
    rows = []
    for nodes, sp, batch in AT_4K:
        plan = plan_row(nodes, sp, nodes < 128, batch, mtp=False, max_length=4096, document=4096)
        rates = f"{plan.rate():.0f} ({plan.rate(plan.slowest):.0f} to {plan.rate(plan.fastest):.0f})"
        waits = f"{plan.time.exposed / plan.time.micro:.0%}"
        s = plan.settings
        rows.append([str(s.world), f"{s.tokens:,}", _gib(plan), rates, f"{plan.mfu():.1%}", waits])
    return markdown(columns.split(" | "), rows)


# The fastest settings on 32 nodes by rows of 32k tokens per step, which `plan --search` finds; and, for as many rows,
# with experts shared by a node's GPUs.
BY_ROWS = (
    "32n_64rows.yaml",
    "32n_128rows.yaml",
    "32n_sp1_bs1.yaml --trainer.accumulate_grad_batches 1",
    "32n_32k.yaml --trainer.accumulate_grad_batches 1",
    "32n_32k.yaml",
)
SHARED = (
    "32n_64rows.yaml --model.experts_per_shard 32",
    "32n_128rows.yaml --model.experts_per_shard 16",
    *(
        "32n_sp1_bs1.yaml --model.experts_per_shard 32 --model.layer_input offload "
        f"--trainer.accumulate_grad_batches {accumulate}"
        for accumulate in (1, 2, 4)
    ),
)


def _memory(plan: Plan) -> list[str]:
    return [f"{plan.device_total / GIB:.1f}", f"{plan.host_total / GIB:,.0f}"]


def table_by_rows(plans: list[Plan]) -> list[str]:
    columns = (
        "rows per step | config | tokens per GPU and micro-step | GiB per GPU | host GiB per node | s per step "
        "| tokens/s per GPU"
    )
    rows = []
    for config, plan in zip(BY_ROWS, plans, strict=True):
        which = [f"{plan.settings.rows_per_step:,}", f"`{config}`", f"{plan.settings.tokens:,}"]
        step = f"{plan.time.step:.1f} ({plan.fastest:.0f} to {plan.slowest:.0f})"
        rows.append([*which, *_memory(plan), step, f"{plan.rate():.0f}"])
    return markdown(columns.split(" | "), rows)


def table_shared(plans: list[Plan]) -> list[str]:
    """What shared experts and gradients sent in bf16 are predicted to gain beside `plans`, those of BY_ROWS."""
    columns = (
        "rows per step | tokens/s per GPU, experts not shared | and `reduce_dtype bf16` | shared by 8 "
        "| and `reduce_dtype bf16` | GiB per GPU | host GiB per node"
    )
    half, rows = "--trainer.strategy.reduce_dtype bf16", []
    for before, own, config in zip(plans, BY_ROWS, SHARED, strict=True):
        shared = f"{config} --trainer.strategy.expert_parallel_size 8"
        others = [plan_file(*f"configs/{text}".split()) for text in (f"{own} {half}", shared, f"{shared} {half}")]
        both = [before, *others]
        assert len({plan.settings.rows_per_step for plan in both}) == 1 and all(plan.fits for plan in both)
        rates = [f"{plan.rate():.0f}" for plan in both]
        rows.append([f"{before.settings.rows_per_step:,}", *rates, *_memory(both[-1])])
    return markdown(columns.split(" | "), rows)


WALKTHROUGH = "configs/32n_128rows.yaml"


def walkthrough() -> list[str]:
    """The command and what it prints, with --scale."""
    plan = plan_file(WALKTHROUGH)
    sizes = scale_text(scale(plan.settings, plan.cluster, plan.data, most=1024))
    return ["```", f"$ python -m src.cli plan --config {WALKTHROUGH} --scale", text(plan), "", sizes, "```"]


PAGES = [Path("docs/planning.md"), Path("docs/overview.md"), Path("benchmarks/RESULTS.md")]
HEAD = re.compile(r"^# plan: .*$", re.MULTILINE)


def tables() -> dict[str, list[str]]:
    by_rows = [plan_file(*f"configs/{config}".split()) for config in BY_ROWS]
    return {
        "rows": table_by_rows(by_rows),
        "shared": table_shared(by_rows),
        "guide": guide_table(),
        "4k": table_4k(),
        "walkthrough": walkthrough(),
        "measured": plan_check.table(plan_check.read_lines(LINES)),
    }


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
    for path in sorted(Path("configs").glob("*.yaml")):
        head = path.read_text(encoding="utf-8")
        if HEAD.search(head):
            path.write_text(HEAD.sub(f"# plan: {verdict(path)}", head), encoding="utf-8")
