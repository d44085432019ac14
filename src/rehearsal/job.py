"""A few optimizer steps of one rank, on rows of random tokens, with what they took."""

import importlib
import itertools
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from src.datamodules.collate import Batch, Document, collate, shard

from .loopback import join
from .timeline import busy, read

log = logging.getLogger(__name__)


def host_in_use() -> int:
    """Bytes of this machine's memory that no process could have for the asking; caches of files do not count."""
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)


@dataclass(frozen=True)
class Job:
    """What one rank does of it. rows: the lengths of each row's documents; rows are taken in turn. accumulate:
    micro-steps of an optimizer step."""

    world: int
    sp: int
    batch_size: int
    accumulate: int
    rows: list[list[int]]
    vocab: int


class Rows(IterableDataset[Batch]):
    """Micro-batches of random tokens, every one a target: this rank's slice of each."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __iter__(self) -> Iterator[Batch]:
        job, random, rows = self.job, np.random.default_rng(0), itertools.cycle(self.job.rows)
        while True:
            step = [[n for _ in range(job.batch_size) for n in next(rows)] for _ in range(job.accumulate)]
            tokens = job.world // job.sp * sum(map(sum, step))
            counts = {"step_tokens": tokens, "step_targets": tokens, "step_mtp_targets": tokens}
            for lengths in step:
                documents = [
                    Document(random.integers(0, job.vocab, n).astype(np.int32), np.array([[0, n]], np.int32), "random")
                    for n in lengths
                ]
                yield shard(collate(documents, job.sp), 0, job.sp) | counts


@dataclass
class Measured:
    """Of the steps after the first, which compiles: seconds of each micro-step, an optimizer step's last with the
    optimizer's; bytes of the device at most, allocated and reserved. set_up: bytes allocated at most before them.

    host: bytes of the machine's memory in use at most, less what was before; of any process, sampled all along.
    busy: parts of a micro-step, neither a step's first nor its last, in which the compute stream and any stream run.
    load: max/mean expert load, averaged over layers. gather: bytes per second of the copies that stand for one.
    """

    micro_steps: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    set_up: int = 0
    allocated: int = 0
    reserved: int = 0
    host: int = 0
    busy: tuple[float, float] | None = None
    load: float | None = None
    gather: float = 0.0

    @property
    def micro(self) -> float | None:
        """None where each step has but one."""
        before_last = [seconds for step in self.micro_steps for seconds in step[:-1]]
        return median(before_last) if before_last else None

    @property
    def last(self) -> float:
        """An optimizer step's last micro-step, and the optimizer's step."""
        return median(step[-1] for step in self.micro_steps)


class _HostPeak(threading.Thread):
    """Samples the host memory in use: the peak lies within a step, not at its end."""

    def __init__(self, interval: float = 0.05) -> None:
        super().__init__(daemon=True)
        self.peak, self._interval, self._stopped = host_in_use(), interval, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._interval):
            self.peak = max(self.peak, host_in_use())

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return max(self.peak, host_in_use())


class _Record(pl.Callback):
    def __init__(self, measured: Measured, timeline: Path | None) -> None:
        self.measured, self.timeline = measured, timeline
        self._steps = list[list[float]]()
        self._profile: torch.profiler.profile | None = None

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            if self._steps:  # the module logs a step's loss after this callback's turn at its end
                self._read_loss(trainer)
            self._steps.append([])
            if torch.cuda.is_initialized():
                if len(self._steps) == 1:
                    self.measured.set_up = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
        # A middle micro-step of the last step is traced; its time counts no longer.
        if self.timeline is not None and self._is_traced(trainer):
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.start()
        self._began = self._now()

    def _is_traced(self, trainer: pl.Trainer) -> bool:
        last_step = trainer.global_step == trainer.max_steps - 1
        return last_step and trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 1

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        seconds = self._now() - self._began
        if self._profile is None:
            self._steps[-1].append(seconds)
        else:
            self._profile.stop()
            try:
                self._profile.export_chrome_trace(str(self.timeline))
                self.measured.busy = busy(read(Path(str(self.timeline))))
            except (OSError, ValueError) as error:  # the rest is measured: a full disk leaves a cut file or none
                log.error("--timeline %s was not written: %s", self.timeline, error)
            self._profile = None
        measured = self.measured
        if torch.cuda.is_initialized() and len(self._steps) > 1:
            measured.allocated = max(measured.allocated, torch.cuda.max_memory_allocated())
            measured.reserved = max(measured.reserved, torch.cuda.max_memory_reserved())

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.measured.micro_steps = self._steps[1:]
        self._read_loss(trainer)
        if pl_module.expert_load is not None:  # [MoE layers, experts]
            load = pl_module.expert_load.double()
            self.measured.load = float((load.max(1).values / load.mean(1)).mean())
        self.measured.gather = self._gather_rate(trainer.strategy.root_device, trainer.world_size)

    def _read_loss(self, trainer: pl.Trainer) -> None:
        self.measured.losses.append(float(trainer.callback_metrics["train/loss"]))

    def _gather_rate(self, device: torch.device, world: int) -> float:
        numel = (128 << 20 if device.type == "cuda" else 2 << 20) // world + world
        part = torch.ones(numel, dtype=torch.bfloat16, device=device)
        out, world_group = part.new_empty(world * numel), dist.group.WORLD
        assert world_group is not None
        for _ in range(2):  # the second is timed
            began = self._now()
            world_group._allgather_base(out, part)
            seconds = self._now() - began
        return out.nbytes / seconds

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


def rehearse(
    job: Job,
    module: pl.LightningModule,
    steps: int,
    callbacks: list[pl.Callback],
    timeline: Path | None = None,
    **trainer: Any,
) -> Measured:
    """Trains `steps` optimizer steps, two at least, as rank 0 of job.world; nothing is written but the timeline.

    timeline: where a middle micro-step's trace goes, .json or .json.gz; three micro-steps per step at least, on CUDA.
    trainer: `accelerator`, `strategy`, `precision` and `gradient_clip_val` of the job's.
    """
    measured, before, host = Measured(), host_in_use(), _HostPeak()
    host.start()
    os.environ.update(NODE_RANK="0", LOCAL_RANK="0")
    # DeepSpeed's collectives in shared memory, on CPU, would wait for the other processes. The attribute
    # `deepspeed.comm.torch` is the package torch, which deepspeed.comm imports.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    join(job.world)
    for message in (
        r"expert_parallel_size \d+ is more than the 1 processes",  # the nodes of one process below are no nodes
        r"You defined a `validation_step` but have no `val_dataloader`",
        r"The 'train_dataloader' does not have many workers",
    ):
        warnings.filterwarnings("ignore", f".*{message}")
    runner = pl.Trainer(
        **trainer,
        devices=1,
        num_nodes=job.world,  # of one process each: nothing but the world's size is taken from it
        plugins=[LightningEnvironment()],
        callbacks=[*callbacks, _Record(measured, timeline)],
        max_steps=steps,
        accumulate_grad_batches=job.accumulate,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        runner.fit(module, DataLoader(Rows(job), batch_size=None))
    finally:
        measured.host = host.stop() - before
    return measured
