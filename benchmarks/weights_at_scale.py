"""Weights in and out at their true widths: load, one step, checkpoint, export, in bytes, seconds and memory.

    python -m benchmarks.weights_at_scale [--folder DIR] [--processes 2 4] [--bandwidth 100]

Builds a directory of random weights with DeepSeek-V3's names and shapes for a few layers and experts, in FP8 as it is
published and in BF16, and takes it through ZeRO-3 on some gloo processes. A machine of 120 GiB gets the true
vocabulary, a dense layer and an MoE layer of 16 experts (61 GB of memory, 60 GB of disk); a smaller one a vocabulary of
4,096 and one MoE layer of 4 experts (9 GB each), since attention and MLP of a dense layer alone have 0.6e9 parameters.

Files leave the page cache before they are read. Memory is anonymous memory (RssAnon), rank by rank, sampled each
millisecond. Everything is written below --folder, by default a temporary one, and removed.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common import TRUE_CONFIG, head, table
from benchmarks.memory import PeakAnonymous
from src.weights.hf_writer import index, plan_shards, write_json, write_shard
from src.weights.layout import check_layout
from src.weights.output import Dtype, output_tensors
from src.weights.random_source import RandomSource
from src.weights.side_files import architecture, write_config
from tests.distributed.spawn import run_distributed

GB, MIB = 1e9, 2**20
BLOCK = 16 * MIB
SHARD = "250MB"
FEW = {"num_nextn_predict_layers": 0}
LARGE = FEW | {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 16, "n_group": 4}
SMALL = FEW | {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
}
# 671B in bytes: weights in FP8 and BF16, the masters that an export reads, a checkpoint.
NODES, RANKS = 32, 256
FP8, BF16, MASTERS, CHECKPOINT = 0.69e12, 1.34e12, 2.7e12, 8.05e12


@dataclass(frozen=True)
class Part:
    """One part of the way on all ranks: bytes moved by all together, the slowest's seconds, the most memory of one."""

    nbytes: int
    seconds: float
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="on the file system to measure; the system's temporary one by default")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--bases", choices=["fp8", "bf16"], nargs="+", default=["fp8", "bf16"])
    parser.add_argument("--bandwidth", type=float, default=100, help="GB/s of a cluster's file system, for 32 nodes")
    args = parser.parse_args()
    small = psutil.virtual_memory().total < 120 * 2**30
    config = json.loads((TRUE_CONFIG / "config.json").read_text()) | (SMALL if small else LARGE)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        rates = [disk(folder)]
        found: dict[tuple[str, int], dict[str, Part]] = {}
        for dtype in args.bases:
            build(folder / dtype, config, dtype)
            for processes in args.processes:
                found[dtype, processes] = way(folder, folder / dtype, processes)
                rates.append(disk(folder))
        layout = check_layout(folder / args.bases[0])
    head("Weights in and out", torch.device("cpu"))
    memory = psutil.virtual_memory().total / 2**30
    print(
        f"{os.cpu_count()} cores, {memory:.0f} GiB; {layout.parameters / 1e9:.3f}e9 parameters: {config_line(config)}"
    )
    write, read = (statistics.median(column) for column in zip(*rates, strict=True))
    spread = [f"{min(column) / GB:.2f} to {max(column) / GB:.2f}" for column in zip(*rates, strict=True)]
    print(
        f"\nDisk, four streams, median of {len(rates)} times in between: {write / GB:.2f} GB/s written with fsync "
        f"({spread[0]}), {read / GB:.2f} GB/s read cold ({spread[1]}).\n"
    )
    rows = []
    for (dtype, processes), parts in found.items():
        for what, part in parts.items():
            rate = part.nbytes / part.seconds
            limit = read if what.startswith(("load", "check")) else write
            cells = [dtype, processes, what, part.nbytes / GB, part.seconds, rate / GB, f"{rate / limit:.0%}"]
            rows.append([*cells, f"{part.memory / MIB:.0f}"])
    table(("base", "processes", "what", "GB", "s", "GB/s", "of the disk", "MiB above"), rows)
    (base, processes), parts = next(iter(found.items()))
    cluster(base, parts, processes, args.bandwidth * GB)


def config_line(config: dict[str, Any]) -> str:
    moe = config["num_hidden_layers"] - config["first_k_dense_replace"]
    return (
        f"vocabulary {config['vocab_size']:,}, {config['first_k_dense_replace']} dense and {moe} MoE layers of "
        f"{config['n_routed_experts']} experts, all widths DeepSeek-V3's"
    )


# -- the disk ---------------------------------------------------------------------------------------------------------


def disk(folder: Path, streams: int = 4, nbytes: int = 2**29) -> tuple[float, float]:
    """Bytes a second of `streams` files at once: written and synchronised, and read from the disk itself."""
    block = os.urandom(BLOCK)
    files = [folder / f"stream{number}" for number in range(streams)]

    def write(file: Path) -> None:
        with open(file, "wb") as stream:
            for _ in range(nbytes // BLOCK):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())

    def read(file: Path) -> None:
        buffer = bytearray(BLOCK)
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    def rate(work: Callable[[Path], None]) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(streams) as pool:
            list(pool.map(work, files))
        return streams * nbytes / (time.perf_counter() - began)

    written = rate(write)
    forget(files)
    found = written, rate(read)
    for file in files:
        file.unlink()
    return found


def forget(files: Iterable[Path]) -> None:
    """Drops files from the page cache, so that the next reading is the disk's."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def size(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern))


# -- the way ----------------------------------------------------------------------------------------------------------


def build(directory: Path, config: dict[str, Any], dtype: Dtype) -> None:
    """A published directory of random weights."""
    directory.mkdir()
    tensors = output_tensors(RandomSource(architecture(config), seed=0, mtp=False), config, dtype)
    shards = plan_shards(tensors, 10**9)
    for shard in shards:
        write_shard(directory, shard)
    write_json(directory / "model.safetensors.index.json", index(shards))
    write_config(directory, config, dtype=dtype, mtp_layers=0)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_text("{}")


def way(folder: Path, base: Path, processes: int) -> dict[str, Part]:
    """Load, one step, checkpoint, live export; then export of the checkpoint in BF16 and FP8."""
    forget(base.glob("*.safetensors"))
    run = folder / "run"
    ranks = run_distributed(train, processes, base, run, folder / "live")
    checkpoint = run / "checkpoints/step=1.ckpt"
    written = size(checkpoint, "*.pt")
    parts = {what: together([rank[what] for rank in ranks]) for what in ranks[0]}
    parts["save"] = Part(written, parts["save"].seconds, parts["save"].memory)
    parts["live export, BF16"] = resized(parts["live export, BF16"], size(folder / "live", "*.safetensors"))
    shutil.rmtree(folder / "live")
    for dtype in ("bf16", "fp8"):
        forget(checkpoint.rglob("*.pt"))
        out = folder / "out"
        ranks = run_distributed(export_share, processes, checkpoint, out, dtype)
        if dtype == "bf16":
            parts["check of the checkpoint"] = resized(together([rank["check"] for rank in ranks]), written)
        parts[f"export, {dtype.upper()}"] = resized(
            together([rank["export"] for rank in ranks]), size(out, "*.safetensors")
        )
        check_layout(out)
        shutil.rmtree(out)
    shutil.rmtree(run)
    return parts


def together(ranks: list[Part]) -> Part:
    return Part(
        sum(rank.nbytes for rank in ranks), max(rank.seconds for rank in ranks), max(rank.memory for rank in ranks)
    )


def resized(part: Part, nbytes: int) -> Part:
    return Part(nbytes, part.seconds, part.memory)


def train(base: Path, root: Path, out: Path) -> dict[str, Part]:
    """On each rank: what loading, saving and exporting took of it; bytes where only the rank knows them."""
    import lightning.pytorch as pl

    from src.callbacks.export_at_end import ExportAtEnd
    from src.callbacks.run_record import RunRecord
    from src.callbacks.step_checkpoint import StepCheckpoint
    from src.models.sft_module import SFTModule
    from src.strategies import DeepSpeedSPStrategy
    from src.weights.hf_reader import HFDirectorySource
    from src.weights.load import load, persistent
    from tests.distributed.training import MemoryData, documents

    parts: dict[str, Part] = {}

    class Measured(DeepSpeedSPStrategy):
        def load(self, model: Any, directory: str) -> None:
            # Partitions are zeros that take no memory before the first load writes to them.
            kept = sum(getattr(t, "ds_tensor", t).nbytes for t in persistent(model).values())
            for what, written in (("load, cold", kept), ("load, from the page cache", 0)):
                self.barrier()
                source = HFDirectorySource(directory)
                memory, seconds = timed(
                    lambda source=source: load(model, source, num_hidden_layers=model.config.num_hidden_layers)
                )
                parts[what] = Part(source.bytes_read, seconds, max(0, memory - written))

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            memory, seconds = timed(lambda: super(Measured, self).save_checkpoint(*args, **kwargs))
            parts["save"] = Part(0, seconds, memory)

        def export(self, *args: Any) -> None:
            memory, seconds = timed(lambda: super(Measured, self).export(*args))
            parts["live export, BF16"] = Part(0, seconds, memory)

    # Small buckets, so that the step itself takes little beside the 18 bytes of each parameter.
    strategy = Measured(reduce_bucket_size=20_000_000, allgather_bucket_size=20_000_000, sub_group_size=50_000_000)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        precision="bf16-true",
        strategy=strategy,
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[
            StepCheckpoint(every_n_train_steps=0, async_save=False),
            RunRecord("", str(base), str(base)),
            ExportAtEnd(str(out), "bf16", SHARD),
        ],
        default_root_dir=root,
    )
    trainer.fit(SFTModule(str(base)), MemoryData(documents(40), batch_size=1))
    return parts


def export_share(checkpoint: Path, out: Path, dtype: Dtype) -> dict[str, Part]:
    from src.commands import export as module

    check, parts = module.check_manifest, {}

    def timed_check(*args: Any, **kwargs: Any) -> None:
        memory, seconds = timed(lambda: check(*args, **kwargs))
        parts["check"] = Part(0, seconds, memory)
        forget(checkpoint.rglob("*.pt"))

    module.check_manifest = timed_check
    memory, seconds = timed(lambda: module.export(str(checkpoint), str(out), dtype, SHARD))
    parts["export"] = Part(0, seconds - parts["check"].seconds, memory)
    return parts


def timed(work: Callable[[], object]) -> tuple[int, float]:
    """Most anonymous memory above what was there, and seconds."""
    began = time.perf_counter()
    with PeakAnonymous() as peak:
        work()
    return peak.growth, time.perf_counter() - began


# -- 32 nodes ---------------------------------------------------------------------------------------------------------


def cluster(base: str, parts: dict[str, Part], processes: int, bandwidth: float) -> None:
    """Seconds on 32 nodes: the slower of the file system and of 256 processes at the rate that one had here."""
    loaded = FP8 if base == "fp8" else BF16
    print(
        f"Extrapolated to {NODES} nodes, {RANKS} processes, on a file system of {bandwidth / GB:.0f} GB/s: bytes over "
        f"the lesser of that and {RANKS} times one process's measured rate.\n"
    )
    rows = []
    for what, measured, nbytes, moved in (
        (f"load, {base.upper()}", "load, from the page cache", loaded, loaded),
        ("checkpoint", "save", CHECKPOINT, CHECKPOINT),
        ("check of a checkpoint", "check of the checkpoint", CHECKPOINT, CHECKPOINT),
        ("export, BF16", "export, BF16", BF16, BF16 + MASTERS),
        ("export, FP8", "export, FP8", FP8, FP8 + MASTERS),
        ("live export, BF16", "live export, BF16", BF16, BF16),
    ):
        rate = parts[measured].nbytes / parts[measured].seconds / processes
        by_processes, by_files = nbytes / (RANKS * rate), moved / bandwidth
        rows.append([what, moved / 1e12, rate / GB, by_processes, by_files, max(by_processes, by_files)])
    table(("what", "TB moved", "GB/s a process", "s by processes", "s by the file system", "s"), rows)


if __name__ == "__main__":
    main()
