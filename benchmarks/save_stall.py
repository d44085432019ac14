"""For how long a checkpoint holds training up: DeepSpeed's own engines and ours, side by side.

    python -m benchmarks.save_stall --parameters 200e6 [--processes 2] [--offload] [--rounds 5] [--folder DIR]

A stack of square layers under ZeRO-3: bf16 on CUDA, a process a GPU; fp32 over gloo on CPU. In each round every engine
saves once, in turn, so that all see the same machine: three usual steps are timed, a checkpoint is saved, and training
goes on beside it till that is written. Figures are rank 0's smallest over the rounds, in seconds, so that other work on
the machine adds little; the first save of ours beside training also gets its memory, and is shown apart.

DeepSpeed's engines do not synchronise what they write with the disk, ours do. Its writer `fast` needs CUDA, its engine
`datastates` a package that is on no index.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config
from torch import nn

from benchmarks.common import head, table
from src.checkpoints.host_copy import HostMemory, host_copy, nbytes
from src.checkpoints.saving import TAG, CheckpointSaver
from tests.distributed.spawn import free_port

HIDDEN = 2048
USUAL_STEPS = 3
OURS = {"ours, in the foreground": False, "ours, beside training": True}
# DeepSpeed's settings under "checkpoint".
THEIRS: dict[str, dict[str, Any]] = {
    "DeepSpeed, torch (the default)": {},
    "DeepSpeed, fast, writer `python`": {"writer": {"type": "PYTHON"}},
    "DeepSpeed, decoupled, writer `python`": {"writer": {"type": "PYTHON", "decoupled": True}},
}
ON_CUDA: dict[str, dict[str, Any]] = {
    "DeepSpeed, fast, writer `fast`": {"writer": {"type": "FAST"}},
    "DeepSpeed, decoupled, writer `fast`": {"writer": {"type": "FAST", "decoupled": True}},
}
COLUMNS = ("engine", "usual step", "in `save`", "in the steps beside it, above usual", "held up", "written after")


@dataclass
class Round:
    """Seconds: of the steps before a save, in the call that saves, of the steps beside it, until it was written."""

    usual: list[float]
    saving: float
    beside: list[float]
    written: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=200e6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--offload", action="store_true", help="optimizer in host memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the file system to write to; the system's temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        mp.spawn(measure, args=(free_port(), args, folder), nprocs=args.processes)
        result = torch.load(Path(folder) / "result.pt", weights_only=False)
    head("Saving", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(
        f"{args.parameters:.3g} parameters, {args.processes} processes, offload {args.offload}, {args.rounds} rounds. "
        f"Copying rank 0's {result['bytes'] / 1e9:.2f} GB to host memory alone: {min(result['copying']):.2g} s.\n"
    )
    rows = result["rounds"]
    rows["ours, beside training, the first"] = [rows["ours, beside training"].pop(0)]
    table(COLUMNS, [[name, *figures(rounds)] for name, rounds in rows.items()])


def figures(rounds: list[Round]) -> list[float]:
    usual = min(min(r.usual) for r in rounds)
    beside = [sum(r.beside) - usual * len(r.beside) for r in rounds]
    held_up = [r.saving + more for r, more in zip(rounds, beside, strict=True)]
    return [usual, min(r.saving for r in rounds), min(beside), min(held_up), min(r.written for r in rounds)]


def measure(rank: int, port: int, args: argparse.Namespace, folder: str) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "CROSS_RANK": 0, "CROSS_SIZE": 1, "LOCAL_SIZE": args.processes}
    where = {"WORLD_SIZE": args.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in (ranks | where).items()})
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.processes))
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
    engine = build(args, device)
    engine._copy_recovery_script = lambda folder: None
    engines: dict[str, Any] = {name: CheckpointSaver("127.0.0.1") for name in OURS}
    for name, settings in (THEIRS | (ON_CUDA if cuda else {})).items():
        engine._config.checkpoint_config = get_checkpoint_config({"checkpoint": settings})
        engine._configure_checkpointing()
        engines[name] = engine.checkpoint_engine

    step(engine, device)
    copying, memory = list[float](), HostMemory()
    rounds: dict[str, list[Round]] = {name: [] for name in (*THEIRS, *(ON_CUDA if cuda else ()), *OURS)}
    for number in range(args.rounds):
        copying.append(seconds(lambda: host_copy(engine.optimizer.state_dict(), memory)))
        memory.reuse()
        for index, (name, found) in enumerate(rounds.items()):
            engine.checkpoint_engine = engines[name]
            usual = [step(engine, device) for _ in range(USUAL_STEPS)]
            final = Path(folder) / f"{number}.{index}.ckpt"
            dist.barrier()
            began = time.perf_counter()
            save(engine, final, OURS.get(name))
            saving = time.perf_counter() - began
            beside = []
            while not complete(final, ours=name in OURS, device=device):
                beside.append(step(engine, device))
            found.append(Round(usual, saving, beside, time.perf_counter() - began))
    if rank == 0:
        size = nbytes(engine.optimizer.state_dict())
        torch.save({"rounds": rounds, "copying": copying, "bytes": size}, Path(folder) / "result.pt")
    for checkpoint_engine in engines.values():
        checkpoint_engine.cleanup()
    dist.barrier()


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def save(engine: Any, final: Path, asynchronous: bool | None) -> None:
    """By our engine in the foreground or beside training, or by DeepSpeed's own."""
    if asynchronous is None:
        engine.save_checkpoint(str(final), tag=TAG)
        return
    saver = engine.checkpoint_engine
    engine.save_checkpoint(str(saver.begin(final, asynchronous=asynchronous)), tag=TAG)
    saver.start()


def complete(final: Path, ours: bool, device: torch.device) -> bool:
    """Whether rank 0 sees the checkpoint complete, on every rank."""
    flag = torch.tensor(float((final if ours else final / "latest").exists()), device=device)
    dist.broadcast(flag, 0)
    return bool(flag)


def build(args: argparse.Namespace, device: torch.device) -> Any:
    layers = max(1, round(args.parameters / HIDDEN**2))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=dtype) for _ in range(layers)))
    if args.offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(model.parameters(), lr=1e-6)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3} | ({"offload_optimizer": {"device": "cpu"}} if args.offload else {}),
        "bf16": {"enabled": device.type == "cuda"},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def step(engine: Any, device: torch.device) -> float:
    """Seconds of one optimizer step."""
    began = time.perf_counter()
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.ones(16, HIDDEN, device=device, dtype=dtype)).float().square().mean())
    engine.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
