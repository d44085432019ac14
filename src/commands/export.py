"""`export`: from a checkpoint to a Hugging Face directory."""

import logging
from pathlib import Path

from src.checkpoints.export import Export
from src.checkpoints.export_folder import join
from src.checkpoints.manifest import check_manifest
from src.checkpoints.zero_reader import ZeroCheckpointSource
from src.launcher import processes
from src.weights.key_map import PerExpert
from src.weights.output import Dtype

log = logging.getLogger(__name__)


def export(
    ckpt: str,
    out: str,
    dtype: Dtype = "bf16",
    max_shard_size: str = "5GB",
    resume: bool = False,
    base: str | None = None,
    accept_unlisted: bool = False,
) -> None:
    """Writes a checkpoint's weights, with config, tokenizer and chat template, as a Hugging Face directory.

    Under `srun` or `torchrun` each process checks its share of the checkpoint's files and writes its share of these.

    Args:
        ckpt: checkpoint directory, with the Hugging Face side files in `ckpt`/hf.
        out: directory to create when the export is complete.
        dtype: bf16; fp8, in DeepSeek's 128 x 128 blocks; or fp32, the masters unchanged.
        max_shard_size: largest file of weights.
        resume: continue an interrupted export of the same checkpoint and settings.
        base: Hugging Face directory that provides an untrained MTP block, and against which the export measures how
            much of the training `dtype` keeps; by default the one that training started from, which the checkpoint
            records.
        accept_unlisted: accept, unchecked, files that the checkpoint's manifest does not list, or all files if there is
            no manifest.

    Raises:
        ValueError: `out` is there already, an interrupted export is and `resume` is not set, or it was one of something
            else; the checkpoint is torn or is not of its config.json's model; `base` has no such block.
    """
    rank, world_size, run = processes()
    target = Path(out).absolute()
    check_manifest(ckpt, accept_unlisted=accept_unlisted, rank=rank, world_size=world_size)
    job = Export.plan(Path(ckpt), PerExpert(ZeroCheckpointSource(ckpt)), dtype, max_shard_size, base)
    if resume and not job.missing(target):
        log.info("%s is complete already", target)
        return
    if rank >= len(job.shards):  # more processes than files
        return
    job.check_room(target)
    plan = {
        "ckpt": str(Path(ckpt).resolve()),
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "base": job.base,
        "beside": job.beside,
    }
    partial = join(target, plan, run, resume)
    if rank == 0 and not (partial / "config.json").is_file():
        job.write_side_files(partial)
    job.write_shards(partial, rank, world_size)
    job.finish(partial, target)
