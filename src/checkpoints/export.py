"""From a checkpoint to a Hugging Face directory, streamed: `python -m src.cli export --ckpt CKPT --out DIR`.

A chunk of one tensor is in memory at a time, whatever the model's size. The files are planned beforehand, so several
processes share them out without talking to one another, and a crash costs the files that were being written. All is
written in `OUT.partial`, which whoever finishes the last file renames to OUT.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from src.checkpoints.fp8 import BLOCK, SCALE_SUFFIX, is_quantised, quantise, scale_shape
from src.checkpoints.hf_reader import INDEX_FILE, HFDirectorySource
from src.checkpoints.hf_writer import (
    OutputTensor,
    Shard,
    index,
    is_complete,
    parse_size,
    plan_shards,
    write_json,
    write_shard,
)
from src.checkpoints.key_map import PerExpert, hf_shapes, mtp_copies, mtp_layer
from src.checkpoints.side_files import architecture, copy_side_files, read_config, write_config
from src.checkpoints.source import CHUNK, WeightSource, chunks, raise_listed
from src.checkpoints.zero_reader import ZeroCheckpointSource

log = logging.getLogger(__name__)

Dtype = Literal["bf16", "fp8", "fp32"]

RUN_RECORD = "run.json"
_PLAN = ".export.json"
_PATIENCE = 120  # seconds for which a process waits for the plan of the one that made the directory


def export(
    ckpt: str,
    out: str,
    dtype: Dtype = "bf16",
    max_shard_size: str = "5GB",
    resume: bool = False,
    base: str | None = None,
) -> None:
    """Writes a checkpoint's weights, with config, tokenizer and chat template, as a Hugging Face directory.

    Under `srun` or `torchrun` each process writes its share of the files.

    Args:
        ckpt: checkpoint directory, with the Hugging Face files beside the weights in `ckpt`/hf.
        out: directory that appears when the export is complete.
        dtype: bf16; fp8, DeepSeek's 128 x 128 blocks; or fp32, the masters as they are.
        max_shard_size: most bytes of tensors in a file.
        resume: go on with an export of the same checkpoint and settings that was interrupted.
        base: Hugging Face directory from which the multi-token-prediction block comes where it was not trained; by
            default the one that training started from, which the checkpoint records.

    Raises:
        ValueError: `out` is there already, an interrupted export is and `resume` is not set, or it was one of something
            else; the checkpoint is torn or is not of its config.json's model; `base` has no such block.
    """
    rank, world_size, run = _processes()
    target = Path(out).absolute()
    side = Path(ckpt) / "hf"
    config = read_config(side)
    trained = PerExpert(ZeroCheckpointSource(ckpt))
    base = base or _recorded_base(Path(ckpt), config)
    untrained = HFDirectorySource(base, dequantise=dtype != "fp8") if base else None
    tensors = output_tensors(trained, config, dtype, untrained)
    shards = plan_shards(tensors, parse_size(max_shard_size))
    if resume and all(is_complete(target, shard) for shard in shards):
        log.info("%s is complete already", target)
        return
    if rank >= len(shards):  # more processes than files
        return
    plan = {"ckpt": str(Path(ckpt).resolve()), "dtype": dtype, "max_shard_size": max_shard_size, "base": base}
    partial = _join(target, plan, run, resume)

    if rank == 0 and not (partial / "config.json").is_file():
        mtp = any(mtp_layer(tensor.name, config["num_hidden_layers"]) for tensor in tensors)
        if config.get("num_nextn_predict_layers") and not mtp:
            log.warning(
                "the multi-token-prediction block was not trained, and neither --base nor the directory that training "
                "started from has one: exporting without it"
            )
        copy_side_files(side, partial, skip=("config.json",))
        if len(shards) > 1:
            write_json(partial / INDEX_FILE, index(shards))
        write_config(partial, config, dtype=dtype, mtp_layers=int(mtp))  # the last: it says that the others are there
    _write(partial, shards[rank::world_size], progress=rank == 0)
    _finish(partial, target, shards)


def _recorded_base(ckpt: Path, config: dict[str, Any]) -> str | None:
    """Where training started from, if that has weights and the model has an MTP block to take from them."""
    record = ckpt / RUN_RECORD
    if not config.get("num_nextn_predict_layers") or not record.is_file():
        return None
    base = Path(json.loads(record.read_text())["base"])
    return str(base) if any(base.glob("*.safetensors")) else None


def output_tensors(
    trained: WeightSource, config: dict[str, Any], dtype: Dtype, base: WeightSource | None = None
) -> list[OutputTensor]:
    """What an export consists of, in the order of the files.

    Args:
        trained: the weights in Hugging Face names; without those of the MTP block where that was not built.
        config: the content of config.json.
        dtype: of all weights but `e_score_correction_bias`, which is always F32.
        base: where the MTP block comes from if it is not in `trained`. Where its dtypes are those to be written, its
            tensors are copied byte for byte; for fp8 it is to be opened with dequantise=False.

    Raises:
        ValueError: one list of the tensors that are missing, unexpected or mis-shaped.
    """
    model = architecture(config)
    layers = model.num_hidden_layers
    copies = mtp_copies(layers)
    have = dict.fromkeys(trained.names())
    built = any(mtp_layer(name, layers) for name in have)
    shapes = hf_shapes(model, mtp=built or base is not None)
    available = set(base.names()) if base is not None else set()

    tensors, problems = [], [f"unexpected: {name} {trained.shape(name)}" for name in have if name not in shapes]
    for name, shape in shapes.items():
        stored = copies.get(name, name)  # the copies are written from the trained embedding and head
        source = base if not built and mtp_layer(stored, layers) else trained
        assert source is not None, "the MTP block is written only where it was built or a base is given"
        if stored not in (have if source is trained else available):
            problems.append(f"missing: {stored} {shape}" + ("" if source is trained else " in the base"))
        elif source.shape(stored) != shape:
            problems.append(f"shape of {stored}: {source.shape(stored)} instead of {shape}")
        else:
            tensors += _output(name, stored, source, shape, dtype)
    raise_listed(f"{len(problems)} tensors are not those of config.json; check which model was trained:", problems)
    return tensors


def _output(name: str, stored: str, source: WeightSource, shape: tuple[int, ...], dtype: Dtype) -> list[OutputTensor]:
    """The tensor `name`, read as `stored`: in FP8 values and scales, otherwise one."""
    if dtype == "fp8" and is_quantised(name):
        scale = name + SCALE_SUFFIX
        if source.dtype(stored) == torch.float8_e4m3fn:
            return [
                OutputTensor(name, shape, torch.float8_e4m3fn, _Cast(source, stored, torch.float8_e4m3fn)),
                OutputTensor(
                    scale, scale_shape(shape), torch.float32, _Cast(source, stored + SCALE_SUFFIX, torch.float32)
                ),
            ]
        quantised = _Quantise(source, stored)
        return [
            OutputTensor(name, shape, torch.float8_e4m3fn, quantised),
            OutputTensor(scale, scale_shape(shape), torch.float32, quantised.scales),
        ]
    exact = dtype == "fp32" or name.endswith("e_score_correction_bias")
    written = torch.float32 if exact else torch.bfloat16
    return [OutputTensor(name, shape, written, _Cast(source, stored, written))]


@dataclass
class _Cast:
    """A tensor's chunks in another dtype."""

    source: WeightSource
    name: str
    dtype: torch.dtype

    def __call__(self) -> Iterator[torch.Tensor]:
        for start, stop in chunks(0, torch.Size(self.source.shape(self.name)).numel()):
            yield self.source.read(self.name, start, stop).to(self.dtype)


@dataclass
class _Quantise:
    """A weight's e4m3 chunks, bands of rows; the scales are left over from them, or made anew in another file."""

    source: WeightSource
    name: str
    _scales: list[torch.Tensor] = field(default_factory=list)

    def __call__(self) -> Iterator[torch.Tensor]:
        rows, columns = self.source.shape(self.name)
        self._scales.clear()
        band = max(1, CHUNK // (BLOCK * columns)) * BLOCK
        for start, stop in chunks(0, rows, band):
            weight = self.source.read(self.name, start * columns, stop * columns).view(-1, columns)
            values, scale = quantise(weight)
            self._scales.append(scale.view(-1))
            yield values.view(-1)

    def scales(self) -> Iterator[torch.Tensor]:
        if not self._scales:
            for _ in self():
                pass
        yield torch.cat(self._scales)
        self._scales.clear()


def _processes() -> tuple[int, int, str]:
    """Rank, number of processes and what they call this run, from `torchrun` or `srun`; one process otherwise."""
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        run = [environment.get(key, "") for key in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
        return int(environment["RANK"]), int(environment["WORLD_SIZE"]), "torchrun " + " ".join(run)
    # In a batch script without srun SLURM_NTASKS is there too, but no other process is.
    if "SLURM_STEP_NUM_TASKS" in environment:
        run = [environment.get(key, "") for key in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
        return int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]), "srun " + " ".join(run)
    return 0, 1, uuid.uuid4().hex


def _join(out: Path, plan: dict[str, Any], run: str, resume: bool) -> Path:
    """The directory to write in: made by whichever process of this run comes first, or left by an interrupted run."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and is not empty: give another --out, or remove it")
    partial = out.with_name(out.name + ".partial")
    plan_file = partial / _PLAN
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        waited = time.monotonic() + _PATIENCE
        while not plan_file.is_file() and time.monotonic() < waited and not resume:
            time.sleep(0.1)
        found = json.loads(plan_file.read_text()) if plan_file.is_file() else {"plan": plan}
        if found.get("run") != run and not resume:
            raise ValueError(f"{partial} is left of an interrupted export: go on with --resume, or remove it") from None
        if found["plan"] != plan:
            raise ValueError(f"{partial} is an export of {found['plan']}, not of {plan}: remove it") from None
        if found.get("run") == run:
            return partial
    write_json(plan_file, {"run": run, "plan": plan})
    return partial


def _write(partial: Path, shards: list[Shard], progress: bool) -> None:
    with tqdm(
        total=sum(shard.nbytes for shard in shards), unit="B", unit_scale=True, desc="Exporting", disable=not progress
    ) as bar:
        update: Callable[[int], object] = bar.update
        for shard in shards:
            if is_complete(partial, shard):
                update(shard.nbytes)
            else:
                write_shard(partial, shard, update)


def _finish(partial: Path, out: Path, shards: list[Shard]) -> None:
    """Renames the directory if no file is missing any more; otherwise another process will."""
    missing = sum(not is_complete(partial, shard) for shard in shards)
    if missing or not (partial / "config.json").is_file():
        if partial.is_dir():
            log.info("%d of %d files are left to the other processes", missing, len(shards))
        return
    for left in partial.glob(".model*.safetensors.*"):  # written aside by a process that was killed
        left.unlink(missing_ok=True)
    try:
        (partial / _PLAN).unlink(missing_ok=True)
        partial.rename(out)
    except FileNotFoundError:  # another process saw the last file at the same moment
        return
    log.info("exported %.2f GB in %d files to %s", sum(shard.nbytes for shard in shards) / 1e9, len(shards), out)
