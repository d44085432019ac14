"""What NCCL's kernels take from the computation beside them, and it from them.

    torchrun --nproc-per-node=4 -m benchmarks.nccl_beside [--out F.jsonl]
    NCCL_MAX_CTAS=8 torchrun ...     the same with at most so many thread blocks for NCCL

A gather of a shard of 16 experts in bf16 and the reduction of its larger weight's gradient in fp32, as ZeRO-3 makes
them, run over and over on a stream of their own while another stream computes.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.attention import inputs
from benchmarks.common import BF16, head, table, true_config
from src.models.kernels import resolve_attention

EXPERTS = 16
Run = Callable[[], object]


def alone(run: Run, count: int) -> float:
    """ms of a call, of the slowest rank, so that all ranks reckon with the same."""
    dist.barrier()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    stop.record()
    torch.cuda.synchronize()
    value = torch.tensor(start.elapsed_time(stop) / count, device="cuda")
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def together(collective: Run, calls: int, side: torch.cuda.Stream, compute: Run) -> tuple[float, float]:
    """ms of a collective and of a computation. The computation goes on, two calls ahead, until the last collective has
    ended, and only what ended before that counts."""
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    begun, start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    with torch.cuda.stream(side):
        begun.record()
        for _ in range(calls):
            collective()
        stop.record()
    start.record()
    ends: list[torch.cuda.Event] = []
    while not stop.query():
        compute()
        ends.append(torch.cuda.Event(enable_timing=True))
        ends[-1].record()
        if len(ends) > 2:
            ends[-3].synchronize()
    torch.cuda.synchronize()
    inside = [start.elapsed_time(end) for end in ends if end.elapsed_time(stop) >= 0]
    assert inside, "the collectives were over before one computation was: more --seconds"
    return begun.elapsed_time(stop) / calls, inside[-1] / len(inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="rank 0 appends a line for each pair here")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--carveout", type=int, default=0, help="multiprocessors that products leave free")
    parser.add_argument("--priority", type=int, default=0, help="of the collectives' stream; -1 is the highest")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each pair, were the collectives alone")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=device)
    rank, size = dist.get_rank(), dist.get_world_size()
    config = true_config()
    hidden, inner, tokens = config.hidden_size, config.moe_intermediate_size, options.tokens

    product = torch.randn(8192, 8192, device=device, dtype=BF16)
    weight = (0.02 * torch.randn(EXPERTS, 2 * inner, hidden, device=device)).to(BF16)
    rows = torch.randn(tokens, hidden, device=device, dtype=BF16)
    ends = torch.arange(1, EXPERTS + 1, device=device, dtype=torch.int32) * (tokens // EXPERTS)
    kernel = resolve_attention("auto", device, BF16)
    (q, k, v), packing, grad = inputs([tokens], config.num_attention_heads // 4, device)
    q, k, v = q.detach(), k.detach(), v.detach()
    results = kernel.forward(q, k, v, packing)
    target = torch.empty_like(rows)
    computations: dict[str, Run] = {
        "product of 8192 x 8192": lambda: product @ product,
        "grouped product of 16 experts": lambda: F.grouped_mm(rows, weight.mT, offs=ends),
        "attention, forward": lambda: kernel.forward(q, k, v, packing),
        "attention, backward": lambda: kernel.backward(grad, q, k, v, results, packing),
        "copy": lambda: target.copy_(rows),
    }

    shard, largest = EXPERTS * 3 * inner * hidden, EXPERTS * 2 * inner * hidden
    part, whole = (torch.empty(n, device=device, dtype=BF16) for n in (shard // size, shard))
    sums, gradient = (torch.zeros(n, device=device) for n in (largest // size, largest))
    collectives: dict[str, tuple[Run, float]] = {
        "gather": (lambda: dist.all_gather_into_tensor(whole, part), 2e-9 * shard * (size - 1) / size),
        "reduction": (lambda: dist.reduce_scatter_tensor(sums, gradient), 4e-9 * largest * (size - 1) / size),
    }

    ctas = os.environ.get("NCCL_MAX_CTAS", "NCCL's choice")
    if options.carveout:
        torch._C._set_sm_carveout_experimental(options.carveout)
    if rank == 0:
        left = f"carveout {options.carveout}, priority {options.priority}"
        head(f"NCCL beside computation, {size} GPUs, thread blocks: {ctas}; {left}", device)
    side = torch.cuda.Stream(priority=options.priority)
    cells, lines = [], []
    for run in [*computations.values(), *(run for run, _ in collectives.values())]:
        alone(run, 3)
    for what, (collective, gigabytes) in collectives.items():
        usual = alone(collective, 20)
        for name, compute in computations.items():
            ms = alone(compute, max(5, round(100 / alone(compute, 5))))
            calls = round(1e3 * options.seconds / usual) + 1
            collective_beside, beside = together(collective, calls, side, compute)
            line = {
                "kind": "nccl_beside",
                "gpus": size,
                "ctas": ctas,
                "carveout": options.carveout,
                "priority": options.priority,
                "collective": what,
                "collective_gb_s": gigabytes / usual * 1e3,
                "collective_beside_gb_s": gigabytes / collective_beside * 1e3,
                "computation": name,
                "alone_ms": ms,
                "beside_ms": beside,
                "slower": beside / ms,
            }
            lines.append(line)
            rates = (line["collective_gb_s"], line["collective_beside_gb_s"])
            cells.append([what, name, f"{ms:.2f}", f"{beside:.2f}", f"{beside / ms:.2f}", *(f"{r:.0f}" for r in rates)])
    if rank == 0:
        table(["NCCL", "computation", "ms alone", "beside NCCL", "ratio", "NCCL GB/s alone", "beside it"], cells)
        if options.out:
            with options.out.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
