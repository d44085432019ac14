"""Bytes that sequence parallelism exchanges, counted in a run over gloo processes, against expanded queries and keys.

    python -m benchmarks.sp_bytes [--sizes 2 4 8] [--tokens 256]

One attention of DeepSeek-V3's heads, head sizes and ranks; the hidden size, which the exchange does not see, is cut to
--hidden to fit a small machine. Every collective that torch.distributed is asked for is counted, in bf16, by what a
rank receives from others; figures are given for 32,768 tokens, with which they grow linearly. Expanded: all-to-all of
every head's q, k [192] and v [128] before, and of the outputs after, as Ulysses does.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.common import BF16, table, true_config
from benchmarks.layer import geometry
from src.models.deepseek_v3.attention import Attention
from src.strategies.sequence_parallel import ProcessGroupSP

TOKENS = 32768


def count(received: dict[str, int]) -> None:
    """Wraps the collectives that ProcessGroupSP uses."""
    gather, exchange, reduce = dist.all_gather_into_tensor, dist.all_to_all_single, dist.all_reduce
    others = (dist.get_world_size() - 1) / dist.get_world_size()

    def all_gather_into_tensor(out: torch.Tensor, x: torch.Tensor, **kwargs: Any) -> Any:
        received["now"] += int(out.nbytes * others)
        return gather(out, x, **kwargs)

    def all_to_all_single(out: torch.Tensor, x: torch.Tensor, **kwargs: Any) -> Any:
        received["now"] += int(out.nbytes * others)
        return exchange(out, x, **kwargs)

    def all_reduce(x: torch.Tensor, **kwargs: Any) -> Any:
        received["now"] += int(2 * x.nbytes * others)
        return reduce(x, **kwargs)

    dist.all_gather_into_tensor, dist.all_to_all_single, dist.all_reduce = (
        all_gather_into_tensor,
        all_to_all_single,
        all_reduce,
    )


def worker(rank: int, size: int, port: int, tokens: int, hidden: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size)
    config = true_config(hidden_size=hidden)
    torch.manual_seed(0)
    attention = Attention(config).to(BF16)
    assert dist.group.WORLD is not None
    attention.sp = ProcessGroupSP(dist.group.WORLD)
    row = geometry(config, [tokens], torch.device("cpu"))
    x = torch.randn(tokens // size, hidden, dtype=BF16, requires_grad=True)
    received = {"now": 0}
    count(received)
    out = attention(x, row)
    forward = received["now"]
    received["now"] = 0
    out.sum().backward()
    torch.save((forward, received["now"]), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    options = parser.parse_args()
    config = true_config()
    heads, scale = config.num_attention_heads, TOKENS / options.tokens / 2**20
    rows = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            port = 29600 + size
            mp.start_processes(
                worker, (size, port, options.tokens, options.hidden, folder), nprocs=size, start_method="spawn"
            )
            forward, backward = torch.load(Path(folder) / "0.pt")
        a_head = 2 * 192 + 128 + 128  # q, k, v and the output
        expanded = TOKENS / size * heads * a_head * 2 * (size - 1) / size / 2**20
        rows.append(
            [
                size,
                f"{forward * scale:.0f}",
                f"{backward * scale:.0f}",
                f"{expanded:.0f}",
                f"{expanded / (forward * scale):.2f}",
            ]
        )
    print(f"MiB a rank receives for each layer and {TOKENS} tokens of a row, bf16\n")
    table(["SP", "forward, counted", "backward, counted", "forward, expanded", "ratio"], rows)


if __name__ == "__main__":
    main()
