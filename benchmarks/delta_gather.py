"""Gathers of 8-bit deltas over a base in FP8 that is copied from host memory, beside gathers in bf16.

    torchrun --nproc-per-node=2 -m benchmarks.delta_gather                          two GPUs, a minute
    NCCL_P2P_DISABLE=1 torchrun --nproc-per-node=2 -m benchmarks.delta_gather       gathers through host memory, too
    torchrun ... --device cpu --experts 1 --hidden 256 --intermediate 128           a try without GPUs

Weights of a shard of experts: the base in e4m3 with a scale per block of 128 x 128, whole in each rank's pinned memory,
and each rank's part of masters minus base in 8 bits, with the blocks' scales by an all-reduce of their maxima. A
gathered weight is base plus delta, rounded to bf16. Shards follow each other as in a forward pass: two buffers each, a
stream each for the gather, the copy and the computation. Needs torch only.

Legend: E experts of a shard as one matrix [R, C] = [E 3 I, H], W ranks; blocks [r, c] = [R/128, C/128].
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import BF16, arguments, head, relative, table

BLOCK = 128
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
Fill = Callable[[int], object]  # of buffer 0 or 1


def quantise(part: Tensor, first_row: int, blocks: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """8-bit codes of rows [first_row, ...) of a matrix, and the scales [r, c] of all its blocks; a zero block has 1."""
    block_of_row = torch.arange(first_row, first_row + len(part), device=part.device) // BLOCK
    pieces = part.unflatten(1, (blocks[1], BLOCK))
    largest = part.new_zeros(blocks).index_reduce_(0, block_of_row, pieces.abs().amax(2), "amax")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    scales = torch.where(largest > 0, largest / LARGEST[dtype], 1.0)
    codes = pieces / scales[block_of_row, :, None]
    codes = codes.round() if dtype == torch.int8 else codes
    return codes.clamp(-LARGEST[dtype], LARGEST[dtype]).flatten(1).to(dtype), scales


def combine(base: Tensor, base_scale: Tensor, delta: Tensor, delta_scale: Tensor) -> Tensor:
    """Two matrices of codes [R, C] with scales [r, c] -> their sum in bf16, rounded to the nearest."""
    total = _values(base, base_scale) + _values(delta, delta_scale)
    return total.to(BF16).view(base.shape)


def combine_stochastic(base: Tensor, base_scale: Tensor, delta: Tensor, delta_scale: Tensor) -> Tensor:
    """As `combine`, rounded by a hash of the place, as `src.strategies.rounding` does."""
    total = (_values(base, base_scale) + _values(delta, delta_scale)).view(base.shape)
    x = torch.arange(base.numel(), dtype=torch.int32, device=base.device).view(base.shape) ^ 12345
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = ((x ^ ((x >> 15) & 0x1FFFF)) ^ 54321) * -2073271669  # 0x846CA68B
    bits = total.view(torch.int32) + ((x ^ ((x >> 16) & 0xFFFF)) & 0xFFFF)
    return (bits & -65536).view(torch.float32).to(BF16)


def _values(codes: Tensor, scale: Tensor) -> Tensor:
    blocks = codes.view(scale.shape[0], BLOCK, scale.shape[1], BLOCK)
    return blocks.float() * scale[:, None, :, None]


class Passes:
    """Runs over many shards, as a forward pass does: buffers are filled while the shard before them is computed."""

    def __init__(self, device: torch.device, shards: int) -> None:
        self.device, self.shards = device, shards
        self.streams = [torch.cuda.Stream() if device.type == "cuda" else None for _ in range(2)]

    def ms(self, fills: Sequence[Fill], compute: Fill | None = None) -> float:
        """ms per shard, of the slowest rank; each fill has a stream of its own."""
        self._run(fills, compute, 3)
        dist.barrier()
        began = time.perf_counter()
        self._run(fills, compute, self.shards)
        value = torch.tensor(1e3 * (time.perf_counter() - began) / self.shards, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)

    def _run(self, fills: Sequence[Fill], compute: Fill | None, shards: int) -> None:
        used: list[torch.cuda.Event | None] = [None, None]
        for shard in range(shards):
            slot = shard % 2
            for fill, stream in zip(fills, self.streams, strict=False):
                with torch.cuda.stream(stream):
                    if stream is not None and (free := used[slot]) is not None:
                        stream.wait_event(free)
                    fill(slot)
                if stream is not None and compute is not None:
                    torch.cuda.current_stream().wait_stream(stream)
            if compute is not None:
                compute(slot)
                used[slot] = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def changes(rows: int, columns: int, device: torch.device) -> Tensor:
    """A made-up fine-tuning, fp32: 100 steps of AdamW at a rate of 1e-6, at random."""
    return 1e-5 * torch.randn(rows, columns, device=device)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--shards", type=int, default=24, help="of a timed pass")
    parser.add_argument("--delta", choices=["e4m3", "int8"], default="int8")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device(options.device)
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    rank, world = dist.get_rank(), dist.get_world_size()
    measure(options, device, rank, world)
    dist.destroy_process_group()


def measure(options: argparse.Namespace, device: torch.device, rank: int, world: int) -> None:
    cuda, say = device.type == "cuda", rank == 0
    rows, columns = options.experts * 3 * options.intermediate, options.hidden
    blocks, count = (rows // BLOCK, columns // BLOCK), rows * columns
    assert rows % BLOCK == columns % BLOCK == rows % world == 0, "rows and columns must be multiples of 128"
    dtype = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}[options.delta]
    if say:
        p2p = os.environ.get("NCCL_P2P_DISABLE", "0")
        head(f"Delta gathers: {world} ranks, [{rows}, {columns}], delta {options.delta}, P2P_DISABLE {p2p}", device)

    torch.manual_seed(options.seed)
    weights = 0.02 * torch.randn(rows, columns, device=device)  # equal on all ranks
    base_scale = weights.view(blocks[0], BLOCK, blocks[1], BLOCK).abs().amax((1, 3)) / 448
    base = (weights.view(blocks[0], BLOCK, blocks[1], BLOCK) / base_scale[:, None, :, None]).clamp(-448, 448)
    base = base.view(rows, columns).to(torch.float8_e4m3fn)
    del weights
    mine = slice(rank * rows // world, (rank + 1) * rows // world)
    masters = _values(base, base_scale).view(rows, columns)[mine].clone()
    change = changes(rows // world, columns, device)
    masters += change
    on_host = base.cpu().pin_memory() if cuda else base.clone()
    began = time.perf_counter()
    codes, scale = quantise(change, mine.start, blocks, dtype)
    if cuda:
        torch.cuda.synchronize()
    quantised = 1e3 * (time.perf_counter() - began)

    part = masters.to(BF16)
    whole = [torch.empty(rows, columns, dtype=BF16, device=device) for _ in range(2)]
    deltas = [torch.empty(rows, columns, dtype=dtype, device=device) for _ in range(2)]
    bases = [torch.empty_like(base) for _ in range(2)]
    results: list[Tensor | None] = [None, None]
    to_weights = torch.compile(combine) if cuda else combine
    to_weights_at_random = torch.compile(combine_stochastic) if cuda else combine_stochastic
    side = 8192 if cuda else 256
    square = torch.randn(side, side, device=device, dtype=BF16)

    def gather(slot: int) -> None:
        dist.all_gather_into_tensor(whole[slot].view(-1), part.view(-1))

    def gather_delta(slot: int) -> None:
        dist.all_gather_into_tensor(deltas[slot].view(torch.uint8).view(-1), codes.view(torch.uint8).view(-1))

    def copy(slot: int) -> None:
        bases[slot].copy_(on_host, non_blocking=True)

    def add(slot: int) -> None:
        results[slot] = to_weights(bases[slot], base_scale, deltas[slot], scale)

    def add_at_random(slot: int) -> None:
        results[slot] = to_weights_at_random(bases[slot], base_scale, deltas[slot], scale)

    def products(slot: int) -> None:
        for _ in range(number):
            square @ square

    def add_and_products(slot: int) -> None:
        add(slot)
        products(slot)

    for slot in range(2):
        gather(slot), gather_delta(slot), copy(slot), add(slot)
    if cuda:
        torch.cuda.synchronize()
    result = results[0]
    assert result is not None
    off = relative(result[mine].float() - (masters - change), change)
    off_bf16 = relative(whole[0][mine].float() - (masters - change), change)
    alone = relative(_values(deltas[0], scale).view(rows, columns)[mine], change)
    assert alone < 0.04, f"the delta is off by {alone}"
    assert relative(result[mine], whole[0][mine]) < 2.0**-8, "weights differ by more than bf16's step"
    if say:
        print(
            f"Error of the delta by itself {alone:.1e}; of the weights' change: delta8 {off:.4f}, bf16 {off_bf16:.4f}."
        )
        print(f"Codes and scales of a part, once per optimizer step: {quantised:.1f} ms.\n", flush=True)

    passes, number = Passes(device, options.shards), 1
    one = passes.ms([], products)
    parts = {
        "gather, bf16": passes.ms([gather]),
        "gather, 8 bits": passes.ms([gather_delta]),
        "copy of the base": passes.ms([copy]),
        "base plus delta": passes.ms([], add),
        "the same, rounded stochastically": passes.ms([], add_at_random),
    }
    number = max(1, round(1.2 * max(parts.values()) / one))
    both = passes.ms([gather_delta, copy])
    delta8 = passes.ms([gather_delta, copy], add)
    computed = passes.ms([], products)
    received = count * (world - 1) / world
    moved = [2 * received, received, count, 4 * count, 4 * count]
    cells = [[name, t, size / t / 1e6] for (name, t), size in zip(parts.items(), moved, strict=True)]
    cells += [
        ["8-bit gather beside copy", both, f"{received / both / 1e6:.3g} and {count / both / 1e6:.3g}"],
        ["delta8: gather, copy and sum", delta8, f"{2 * count / delta8 / 1e6:.3g} of bf16 weights"],
        [f"{number} products of {side} x {side}", computed, ""],
        ["the same beside bf16 gathers", passes.ms([gather], products), ""],
        ["the same beside 8-bit gathers", passes.ms([gather_delta], products), ""],
        ["the same beside copies", passes.ms([copy], products), ""],
        ["the same beside delta8", passes.ms([gather_delta, copy], add_and_products), ""],
    ]
    if say:
        table(["", "ms per shard", "GB/s received or moved per rank"], cells)


if __name__ == "__main__":
    main()
