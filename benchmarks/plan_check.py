"""What `plan` predicts beside what `benchmarks.step` measured: peak memory and the time of a step.

    python -m benchmarks.plan_check [benchmarks/measured_steps.jsonl]

The lines are those that benchmarks.step ends with; `steady: false` marks a step whose time is not of its mix alone.
Memory is compared as torch.cuda.max_memory_allocated counts it, without context and fragmentation. Nothing is fitted by
configuration: the same rates and formulas as for 256 GPUs.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown
from src.models.deepseek_v3.sizes import sizes_of
from src.planner.account import allocated
from src.planner.cluster import Cluster
from src.planner.ledger import total
from src.planner.settings import Settings
from src.planner.timing import StepTime, step_time
from src.units import GIB

CONFIG = Path(__file__).parent.parent / "configs" / "models" / "deepseek-v3" / "config.json"
LINES = Path(__file__).with_name("measured_steps.jsonl")
# The machines of those runs. One H100, 16 cores, by benchmarks/RESULTS.md; and four of a host, by `preflight --write`.
MACHINE = Cluster(
    gpus_per_node=1, host_memory_gib=128, cpu_cores=16, pcie_in_gb_s=49, pcie_out_gb_s=53, cpu_adam_gparams_s=2.8
)  # fmt: skip
FOUR = Cluster(
    gpus_per_node=4, host_memory_gib=503.8, cpu_cores=64, matmul_tflops=767.6, nccl_intra_node_gb_s=331.3,
    exchange_intra_node_gb_s=331.3, pcie_in_gb_s=40.7, pcie_out_gb_s=32.5, cpu_adam_gparams_s=7.34,
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """GiB and seconds, predicted and measured; None where a line does not have it."""

    name: str
    peak: tuple[float, float | None]
    step: tuple[float, float | None]
    forward: tuple[float, float | None]
    backward: tuple[float, float | None]
    after: tuple[float, float | None]

    @property
    def memory_error(self) -> float:
        return self.peak[0] / self.peak[1] - 1 if self.peak[1] else 0.0

    @property
    def time_error(self) -> float:
        return self.step[0] / self.step[1] - 1 if self.step[1] else 0.0


def settings_of(line: dict[str, Any]) -> Settings:
    options = line["options"]
    fields = json.loads(CONFIG.read_text())
    fields |= {
        "num_hidden_layers": options["layers"],
        "n_routed_experts": options["experts"],
        "vocab_size": options["vocab"],
        "first_k_dense_replace": min(options["dense"], options["layers"]),
    }
    count, length = (int(part) for part in line["mix"].split("x"))
    dp, sp, batch = line.get("dp", 1), line.get("sp", 1), options.get("batch_size", 1)
    shard = options["experts_per_shard"]
    return Settings(
        sizes_of(fields, options["experts"] // 8 if shard == "auto" else shard, mtp=False),  # `auto` of those runs
        nodes=1,
        gpus=dp * sp,
        sp=sp,
        offload_optimizer=line["place"] != "device",
        offload_parameters=line["place"] == "host",
        batch_size=batch,
        max_length=count * length,
        document=length,
        accumulate=options["accumulate"],
        attention_output=options["attention_output"],
        layer_input=options["layer_input"],
        attention_kernel=options.get("attention_kernel", "flash_attn_4"),
        reduce_bucket=options.get("reduce_bucket", 200_000_000),
    )


def compare(line: dict[str, Any]) -> Comparison:
    settings = settings_of(line)
    time: StepTime = step_time(settings, FOUR if line.get("machine") == "four" else MACHINE)
    peak = total(allocated(settings, time.schedule)[0]) / GIB
    options = line["options"]
    name = f"{options['layers']} x {options['experts']} experts, {line['mix']}, {line['place']}, "
    name += f"{options['attention_output']}/{options['layer_input']}, x {options['accumulate']}"
    if settings.world > 1:
        name += f", DP {settings.dp}, SP {settings.sp}"
    parts = [
        line[key] / 1e3 if key in line else None for key in ("forward_ms", "backward_ms", "optimizer_and_after_ms")
    ]
    whole, measured = time.step, line["step_s"] if line.get("steady", True) else None
    if settings.offload_optimizer:  # those runs stepped on the host as DeepSpeed does, and we no longer do
        after = None if settings.offload_parameters else parts[2]  # its gathers from the host copied twice, too
        whole, measured = whole - time.optimizer, None if measured is None or after is None else measured - after
    return Comparison(
        name,
        (peak, line["peak_gib"]),
        (whole, measured),
        (time.forward, parts[0]),
        (time.micro - time.forward, parts[1]),
        (time.optimizer, parts[2]),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["options"].get("device", "cuda") == "cuda"]


COLUMNS = ("", "peak GiB, plan", "measured", "off", "step s, plan", "measured", "off", "forward", "backward", "after")


def table(lines: list[dict[str, Any]]) -> list[str]:
    rows = []
    for c in map(compare, lines):
        cells = [c.name]
        for (predicted, measured), error in ((c.peak, c.memory_error), (c.step, c.time_error)):
            cells += [f"{predicted:.2f}", *((f"{measured:.2f}", f"{error:+.0%}") if measured else ("", ""))]
        rows.append(cells + [f"{a:.2f} / {b:.2f}" if b else "" for a, b in (c.forward, c.backward, c.after)])
    return markdown(COLUMNS, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="?", type=Path, default=LINES)
    print("\n".join(table(read_lines(parser.parse_args().lines))))


if __name__ == "__main__":
    main()
