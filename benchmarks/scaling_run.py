"""What the processes of benchmarks.node_scaling run: callbacks that record steps and that take our hot path out, and
SP's exchanges alone."""

import json
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor

from benchmarks.common import BF16, median_ms, true_config
from src.callbacks.step_checkpoint import StepCheckpoint
from src.rehearsal.job import host_in_use
from src.strategies import deepspeed_sp, partition


class DeepSpeedsOwn(pl.Callback):
    """ZeRO-3 by DeepSpeed's own gather, reduction and step on the host, in place of ours.

    The hooks stay ours: DeepSpeed's, on every module, change the order in which autograd sums three gradients of one
    activation, so that nothing could be compared bit by bit.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        ours: Any = deepspeed_sp
        ours.reduce_by_one_view = ours.step_in_pieces = lambda optimizer: None
        ours.HostAdamW, ours.allocated_once = partial(DeepSpeedCPUAdam, adamw_mode=True), nullcontext
        partition.gather_by_one_view = lambda parameter, init: None


def checksum(module: pl.LightningModule, get: Callable[[Any], Tensor | None]) -> int:
    """CRC-32 of what ZeRO holds of every parameter that is trained, whole, in fp32; a collective."""
    crc = 0
    for _, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad and (tensor := get(parameter)) is not None and dist.get_rank() == 0:
            crc = zlib.crc32(tensor.detach().float().cpu().numpy().tobytes(), crc)
    return crc


class Recorder(pl.Callback):
    """Writes `<out>`: seconds and loss of every optimizer step, the largest memory of any rank, and the host's.

    Args:
        out: a JSON file, written by rank 0.
        keep_checkpoints: otherwise the run's final checkpoint, of which these runs have no use, is not written.
        trace: where rank 0 writes one late step for Perfetto.
        checksums: of the first step's gradients and of the masters at the end.
    """

    def __init__(
        self, out: str, keep_checkpoints: bool = False, trace: str | None = None, checksums: bool = False
    ) -> None:
        self.out, self.keep_checkpoints, self.trace = Path(out), keep_checkpoints, trace
        self.checksums: dict[str, int] | None = {} if checksums else None
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.memory = [0, 0]  # bytes allocated and reserved at most, after the first step and its compilations
        self.host = 0  # bytes of the machine in use, at most, after a step
        self.profiler: Any = None
        self.began = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.keep_checkpoints:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, StepCheckpoint):
                    callback._save = lambda trainer: None  # type: ignore[method-assign]

    def _read_loss(self, trainer: pl.Trainer) -> None:
        if "train/loss" in trainer.callback_metrics:  # the module logs it after this callback's turn
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if batch_idx:
            self._read_loss(trainer)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        traced = self.trace and trainer.is_global_zero and len(self.seconds) == trainer.max_steps - 2
        if traced:
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.__enter__()
        self.began = time.perf_counter()

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        if self.checksums == {}:
            self.checksums["gradients"] = checksum(module, safe_get_full_grad)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if self.seconds:  # each step's own: the Throughput callback resets the peak
                peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                self.memory = [max(pair) for pair in zip(self.memory, peaks, strict=True)]
        self.seconds.append(time.perf_counter() - self.began)
        self.host = max(self.host, host_in_use())
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            self.profiler.export_chrome_trace(self.trace)
            self.profiler = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read_loss(trainer)
        line: dict[str, Any] = {
            "seconds": self.seconds,
            "losses": self.losses,
            "step_s": statistics.median(self.seconds[1:]) if self.seconds[1:] else None,
            "host_gib": self.host / 2**30,
        }
        if self.checksums is not None:
            self.checksums["masters"] = checksum(pl_module, safe_get_full_fp32_param)
            line["checksums"] = self.checksums
        if torch.cuda.is_available():
            memory = torch.tensor(self.memory).cuda()
            if trainer.world_size > 1:
                dist.all_reduce(memory, op=dist.ReduceOp.MAX)
            line |= {"peak_gib": memory[0].item() / 2**30, "reserved_gib": memory[1].item() / 2**30}
        if trainer.is_global_zero:
            self.out.write_text(json.dumps(line))


def exchanges(out: Path, tokens: int) -> None:
    """Times one layer's forward exchanges of a row over all ranks: latents and outputs; q, k, v expanded."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    config = true_config()
    heads, own = config.num_attention_heads, tokens // size
    qk, v = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    latent = config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim
    x = torch.randn(own, latent, device=device, dtype=BF16)
    gathered = torch.empty(tokens, latent, device=device, dtype=BF16)
    output = torch.randn(size, own, heads // size, v, device=device, dtype=BF16)
    expanded = torch.randn(size, own, heads // size, 2 * qk + v, device=device, dtype=BF16)
    received, received_expanded = torch.empty_like(output), torch.empty_like(expanded)

    def ours() -> None:
        dist.all_gather_into_tensor(gathered, x)
        dist.all_to_all_single(received, output)

    def ulysses() -> None:
        dist.all_to_all_single(received_expanded, expanded)
        dist.all_to_all_single(received, output)

    others = (size - 1) / size
    line = {
        "sp": size,
        "latents_ms": median_ms(ours, device, repeats=20),
        "expanded_ms": median_ms(ulysses, device, repeats=20),
        "latents_mib": (gathered.nbytes + output.nbytes) * others / 2**20,
        "expanded_mib": (expanded.nbytes + output.nbytes) * others / 2**20,
    }
    if rank == 0:
        out.write_text(json.dumps(line))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    exchanges(Path(sys.argv[1]), int(sys.argv[2]))
