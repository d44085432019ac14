"""Would gathers of 8-bit deltas over a fixed FP8 base lose anything, fit, and pay? What is not built, measured.

    python -m benchmarks.delta8 [--size 1024]        two minutes on one core

A gathered weight would be base plus delta, rounded to bf16 as always: the base in e4m3 with a scale per block of
128 x 128, as published, in host memory; delta, masters minus base, in 8 bits with a scale per block of its own.

First, how much of the masters' change reaches the gathered weights, beside today's gathers: AdamW's updates over 1 to
1,000 steps, gradients made up, of no weight, some or all in one direction. `kept` is r.d / d.d, and `error` |r - d| /
|d|, r what is left of the masters' change d. Then what `plan` says of such gathers: its own simulation, in which
experts' gathers are half as large, each waits for the copy of its base from the host, and one pass adds the two.
Delta and base share a link where a network card writes into its GPU through the PCIe that copies from the host take,
as in a DGX H100.

Legend: [S, S] one weight, in blocks of 128 x 128.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common import BF16, head, relative, table
from benchmarks.plan_guide import SHARED
from src.commands.plan import plan_file
from src.planner import zero
from src.planner.cluster import Cluster
from src.planner.ledger import SHARDS, Line
from src.planner.network import Exchange
from src.planner.plan import Plan, make_plan
from src.planner.settings import Settings
from src.planner.steps import Weight
from src.planner.streams import CAST, FROM_HOST, Op
from src.planner.zero import Zero
from src.strategies.rounding import Kind, Rounding
from src.units import GIB
from src.weights.fp8 import BLOCK, dequantise, quantise
from src.weights.kept import Kept

STEPS = (1, 10, 100, 1000)
RATES = (2e-7, 1e-6, 1e-5)
BETAS, EPS = (0.9, 0.999), 1e-8
LINK = 55.0  # GB/s into a GPU, assumed: PCIe 5.0 x16, of which 49 to 53 were measured by a copy alone
STEADY = (1.0, 0.01, 0.0)
Delta = Callable[[Tensor], Tensor]  # as it would arrive, fp32
Gather = Callable[[Tensor, Tensor, int], Tensor]  # masters, base, step -> the weights of the forward pass, fp32


# -- what reaches the gathered weights ---------------------------------------------------------------------------------


def adam(size: int, steady: float) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Sums of AdamW's updates at a rate of 1, [S, S], after the steps of STEPS and before the last of them.

    steady: part of the weights whose gradient is the same at every step; the others' is noise.
    """
    mean, is_steady = torch.randn(size, size), torch.rand(size, size) < steady
    total, first, second = (torch.zeros(size, size) for _ in range(3))
    for step in range(1, max(STEPS) + 1):
        gradient = torch.where(is_steady, mean, torch.randn(size, size))
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        before = total.clone() if step in STEPS else None
        size_of = (second / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
        total.addcdiv_(first, size_of, value=-1 / (1 - BETAS[0] ** step))
        if before is not None:
            yield step, before, total.clone()


def e4m3(delta: Tensor) -> Tensor:
    codes, scale = quantise(delta)
    return dequantise(codes.view(-1), scale, 0, delta.shape[1]).view(delta.shape)


def int8(delta: Tensor) -> Tensor:
    blocks = delta.view(len(delta) // BLOCK, BLOCK, -1, BLOCK)
    largest = blocks.abs().amax((1, 3), keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return ((blocks / scale).round() * scale).view(delta.shape)


def rounded(kind: Kind, delta: Delta | None = None) -> Gather:
    """bf16 weights of masters, or of base plus an 8-bit delta."""

    def gather(masters: Tensor, base: Tensor, step: int) -> Tensor:
        values = masters if delta is None else base + delta(masters - base)
        weights = torch.empty(values.numel(), dtype=BF16)
        Rounding(kind)(values.view(-1), weights, "weight", 0, step)
        return weights.float().view(values.shape)

    return gather


DELTAS: dict[str, Delta] = {"int8": int8, "e4m3": e4m3}
GATHERS: dict[str, Gather] = {
    "bf16, nearest": rounded("nearest"),
    "delta, nearest": rounded("nearest", int8),
    "bf16, stochastic": rounded("stochastic"),
    "delta, stochastic": rounded("stochastic", int8),
    "FP8 weights": lambda masters, base, step: e4m3(masters),
}


def part(left: Tensor, change: Tensor) -> str:
    kept = Kept()
    kept.add(left, change)
    return f"{kept.part:.1%} ({kept.relative_error:.1%})"


def of_delta(size: int, steady: float) -> list[list[object]]:
    """What is left of the change in a delta that is not rounded to bf16 yet, of whatever rate."""
    rows: list[list[object]] = []
    for steps, before, after in adam(size, steady):
        cells = [part(delta(after), after) for delta in DELTAS.values()]
        cells += [part(delta(after) - delta(before), after - before) for delta in DELTAS.values()]
        rows.append([f"{steady:.0%}", steps, *cells])
    return rows


def of_weights(base: Tensor, steady: float, rates: Sequence[float]) -> list[list[object]]:
    """What is left of it in gathered weights."""
    rows: list[list[object]] = []
    for steps, _, after in adam(len(base), steady):
        for rate in rates:
            cells = []
            for name, gather in GATHERS.items():
                start = e4m3(base) if name == "FP8 weights" else base.to(BF16).float()
                cells.append(part(gather(base + rate * after, base, steps) - start, rate * after))
            rows.append([f"{steady:.0%}", f"{rate:g}", steps, *cells])
    return rows


def found_again(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales that give bf16 weights exactly, where they were dequantised from e4m3 codes that fill it.

    Each element bounds its block's scale by the bf16 values half a step away; the middle of what all allow is taken.
    """
    codes, _ = quantise(weights.float())
    blocks, values = (t.float().view(len(t) // BLOCK, BLOCK, -1, BLOCK) for t in (weights, codes))
    exact, bits = blocks.abs(), blocks.to(BF16).abs().view(torch.int16)
    above, below = ((bits + step).view(BF16).float() for step in (1, -1))
    size = values.abs()
    none = size == 0
    low = torch.where(none, 0.0, (exact + below) / 2 / size).amax((1, 3))
    high = torch.where(none, torch.inf, (exact + above) / 2 / size).amin((1, 3))
    return codes, (low + high) / 2


# -- what the plan would say -------------------------------------------------------------------------------------------


@contextmanager
def delta8_gathers(link: float) -> Iterator[None]:
    """Has the planner's simulation gather shared experts in 8 bits, copy their base from the host and add the two.

    link: GB/s of what both cross on their way into a GPU.
    """
    collective, gather, arrive = zero.collective, Zero._gather, Zero._arrive

    def halved(s: Settings, cluster: Cluster, ranks: int, nbytes: float, summed: bool = False) -> Exchange:
        if summed or ranks != s.holders:
            return collective(s, cluster, ranks, nbytes, summed)
        delta = collective(s, cluster, ranks, nbytes / 2)
        return delta._replace(seconds=max(delta.seconds, nbytes / (link * 1e9)))

    def gather_and_copy(self: Zero, weights: Sequence[Weight], what: str) -> None:
        gather(self, weights, what)
        experts = [weight for weight in weights if weight.expert]
        if not experts:
            return
        elements = sum(weight.size for weight in experts)
        there = (self.schedule.host, *self._released)
        seconds = elements / (self.cluster.pcie_in_gb_s * 1e9)
        copy = self.schedule.add(Op(FROM_HOST, seconds, f"base of {what}", there))
        passed = 4 * elements / self.cluster.copy  # two codes read, a weight written
        under_way = self._under_way[experts[0]]
        under_way.op = self.schedule.add(Op(CAST, passed, f"base plus delta of {what}", (under_way.op, copy)))
        self.schedule.stolen += passed
        for weight in experts:
            why = f"{weight.size / 1e6:.0f}e6 codes of base and delta of {weight.name}"
            self.ledger.take(f"8 bits {weight.name}", Line(SHARDS, 2 * weight.size, why))

    def arrive_and_add(self: Zero, weight: Weight) -> int:
        op = arrive(self, weight)
        if weight.expert:
            self.ledger.give(f"8 bits {weight.name}")
        return op

    zero.collective, Zero._gather, Zero._arrive = halved, gather_and_copy, arrive_and_add
    try:
        yield
    finally:
        zero.collective, Zero._gather, Zero._arrive = collective, gather, arrive


def base_bytes(plan: Plan) -> float:
    """Of experts' bases per GPU: each has those that it gathers."""
    s = plan.settings.sizes
    moe = s.layers - s.first_k_dense_replace
    return moe * s.n_routed_experts / plan.settings.ep * 3 * s.hidden_size * s.moe_intermediate_size


def planned(network: float) -> list[list[object]]:
    cluster = replace(Cluster(), nccl_inter_node_gb_s=network, exchange_inter_node_gb_s=network / 8)
    rows: list[list[object]] = []
    for config in SHARED[:3]:
        options = "--trainer.strategy.expert_parallel_size 8 --trainer.strategy.reduce_dtype bf16"
        plan = plan_file(*f"configs/{config} {options}".split())
        before = make_plan(plan.settings, cluster, plan.data)
        with delta8_gathers(float("inf")):
            after = make_plan(plan.settings, cluster, plan.data)
        with delta8_gathers(LINK):
            one_link = make_plan(plan.settings, cluster, plan.data)
        base = base_bytes(plan)
        host = before.host_total + plan.settings.gpus * base
        rows.append(
            [
                f"{plan.settings.rows_per_step}",
                f"{before.rate():.0f}, MFU {before.mfu():.1%}",
                f"{after.rate():.0f}, MFU {after.mfu():.1%}",
                f"{one_link.rate():.0f}, MFU {one_link.mfu():.1%}",
                f"{before.time.micro:.1f}, {after.time.micro:.1f}, {one_link.time.micro:.1f}",
                f"{base / 1e9:.0f} GB, {base / cluster.pcie_in_gb_s / 1e9:.1f} s",
                f"{before.host_total / GIB:,.0f} to {host / GIB:,.0f} of {cluster.host_room / GIB:,.0f}",
                f"{before.device_total / GIB:.1f} to {after.device_total / GIB:.1f} of {after.device_room / GIB:.1f}",
                "yes" if after.fits and host <= cluster.host_room else "no",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="of the weight, a multiple of 128")
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    options = parser.parse_args()
    torch.manual_seed(0)
    head(f"8-bit deltas over an FP8 base, weights of [{options.size}, {options.size}]", torch.device("cpu"))
    codes, scale = quantise(0.02 * torch.randn(options.size, options.size))
    base = dequantise(codes.view(-1), scale, 0, options.size).view(codes.shape)
    as_bf16 = base.to(BF16)
    again, scales = found_again(as_bf16)
    back = dequantise(again.view(-1), scales, 0, options.size).view(codes.shape).to(BF16)
    print(
        f"Of a BF16 base dequantised from FP8, codes and scales found again give back all but "
        f"{int((back != as_bf16).sum())} of {back.numel()} weights; codes differ: "
        f"{int((again.view(torch.uint8) != codes.view(torch.uint8)).sum())}.\n"
    )
    other = as_bf16 + 1e-3 * torch.randn_like(base)  # in BF16, and never was FP8
    other = other.to(BF16).float()
    gathered = rounded("nearest", int8)(other, e4m3(other), 0)
    print(
        f"Of a BF16 base that never was FP8, {(gathered != other).float().mean():.1%} of the weights differ before the "
        f"first step, off by {relative(gathered, other):.1e}; rounding to bf16 itself {relative(as_bf16, base):.1e}.\n"
    )
    columns = ["int8, all steps", "e4m3, all steps", "int8, last step", "e4m3, last step"]
    print("Left of the masters' change in the delta, kept (error):\n")
    table(["in one direction", "steps", *columns], [row for part in STEADY for row in of_delta(options.size, part)])
    print("In the weights, all steps; deltas in int8:\n")
    rows = [row for part in STEADY for row in of_weights(base, part, options.rates)]
    table(["in one direction", "lr", "steps", *GATHERS], rows)
    columns = ["rows per step", "bf16 gathers, tokens/s per GPU", "delta8", "on one link", "micro-steps, s"]
    columns += ["base per GPU, copies per pass", "host GiB per node", "GPU GiB", "fits"]
    for network in (370.0, 300.0, 185.0):
        print(f"32 nodes of 8 H100, experts shared by 8, reduce_dtype bf16, a network of {network:.0f} GB/s.\n")
        table(columns, planned(network))


if __name__ == "__main__":
    main()
