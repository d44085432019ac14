"""Streams ZeRO's partitions into a Hugging Face directory.

One chunk of one tensor is in memory at a time, whatever the model's size. The files are planned up front, so several
processes divide them without communication, and a crash costs only the files being written. Everything is written to
`OUT.partial`; the process that finishes the last file renames it to OUT.

The command `export` and the export at the end of `fit` (src/strategies/live_partitions.py) share it: the same weights
give the same bytes, whether they are read from a checkpoint or from the running job.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src.checkpoints.export_folder import PLAN, partial_of
from src.checkpoints.model_card import CARD, from_scratch, model_card
from src.checkpoints.run_files import read_record
from src.disk.durable import publish, sync_file
from src.disk.space import check_room, named_if_full
from src.units import counted
from src.weights.file_size import parse_size
from src.weights.hf_reader import HFDirectorySource
from src.weights.hf_writer import (
    Shard,
    index,
    is_complete,
    plan_shards,
    read_notes,
    write_json,
    write_shard,
)
from src.weights.kept import ENOUGH, Kept, by_group, table
from src.weights.key_map import mtp_layer
from src.weights.output import Dtype, output_tensors
from src.weights.safetensors_files import INDEX_FILE, has_mtp
from src.weights.side_files import copy_side_files, read_config, write_config
from src.weights.source import WeightSource

log = logging.getLogger(__name__)


class OtherRankFailed(RuntimeError):
    """Another rank failed in a collective step; its error is on that rank."""


@dataclass(frozen=True)
class Export:
    """The files of an export, planned before any of them is written.

    Attributes:
        record: directory with the run's config.yaml, run.json and `hf/`, such as a checkpoint.
        config: the content of hf/config.json.
        dtype: bf16, fp8 or fp32.
        base: Hugging Face directory that an untrained multi-token-prediction block comes from; None if there is none.
        beside: the one that training started from, to measure how much is kept; None: not measured.
        shards: the files of weights.
    """

    record: Path
    config: dict[str, Any]
    dtype: Dtype
    base: str | None
    beside: str | None
    shards: list[Shard]

    @classmethod
    def plan(
        cls,
        record: Path,
        trained: WeightSource,
        dtype: Dtype,
        max_shard_size: str,
        base: str | None = None,
        measure: bool = True,
    ) -> "Export":
        """Plans the files without reading any weights.

        Args:
            trained: the weights in Hugging Face names.
            base: by default the directory that `record` names.
            measure: also read the base, to measure how much of the training is kept.

        Raises:
            ValueError: as `export`.
        """
        config = read_config(record / "hf")
        start = _start(record, base) if measure and dtype != "fp32" else None
        if base is None and config.get("num_nextn_predict_layers"):
            base = _recorded_base(record, config["num_hidden_layers"])
        untrained = HFDirectorySource(base, dequantise=dtype != "fp8") if base else None
        tensors = output_tensors(trained, config, dtype, untrained, start)
        beside = None if start is None else str(start.path)
        return cls(record, config, dtype, base, beside, plan_shards(tensors, parse_size(max_shard_size)))

    @property
    def mtp(self) -> bool:
        """Whether the multi-token-prediction block is written."""
        layers = self.config["num_hidden_layers"]
        return any(mtp_layer(tensor.name, layers) for shard in self.shards for tensor in shard.tensors)

    def write_side_files(self, directory: Path) -> None:
        """Writes everything but the weights; config.json last, as the sign that the others are there."""
        if self.config.get("num_nextn_predict_layers") and not self.mtp:
            log.warning(
                "the multi-token-prediction block was not trained, and neither --base nor the directory that training "
                "started from has one: exporting without it"
            )
        with named_if_full(directory):
            copy_side_files(self.record / "hf", directory, skip=("config.json",))
        self._write_card(directory, {})
        if len(self.shards) > 1:
            write_json(directory / INDEX_FILE, index(self.shards))
        write_config(directory, self.config, dtype=self.dtype, mtp_layers=int(self.mtp))

    def _write_card(self, directory: Path, kept: dict[str, Kept]) -> None:
        aside = directory / f".{CARD}.{os.getpid()}"
        text = model_card(self.record, self.config, self.dtype, mtp=self.mtp, kept=kept)
        with named_if_full(directory / CARD):
            aside.write_text(text, encoding="utf-8")
            sync_file(aside)
        aside.rename(directory / CARD)

    def _say_what_is_kept(self, directory: Path) -> None:
        """Adds up the files' notes, for the card and as a printed table; warns if too little is kept."""
        notes = read_notes(directory, self.shards)
        kept = by_group(notes, self.dtype)
        if not kept:
            return
        self._write_card(directory, kept)
        print(f"what {self.dtype} keeps of the training, beside {self.beside}:\n{table(kept)}")
        part = kept["whole"].part
        if part < ENOUGH:
            fits = self.dtype == "fp8" and by_group(notes, "bf16")["whole"].part >= ENOUGH
            log.warning(
                "%s keeps %.1f %% of what training changed in the weights, the rest is the base's: %s keeps it, "
                "--dtype %s (docs/rounding.md)",
                self.dtype,
                100 * part,
                *(2 * ["bf16" if fits else "fp32"]),
            )

    def write_shards(self, directory: Path, rank: int, world_size: int) -> None:
        """Writes this process's missing files of weights; with a bar on rank 0."""
        shards = self.shards[rank::world_size]
        total = sum(shard.nbytes for shard in shards)
        with tqdm(total=total, unit="B", unit_scale=True, desc="Exporting", disable=rank != 0 or None) as bar:
            update: Callable[[int], object] = bar.update
            for shard in shards:
                if is_complete(directory, shard):
                    update(shard.nbytes)
                else:
                    write_shard(directory, shard, update)

    def check_room(self, out: Path) -> None:
        """Raises if the missing files of weights do not fit on `out`'s disk."""
        partial = partial_of(out)
        needed = sum(shard.nbytes for shard in self.shards if not is_complete(partial, shard))
        check_room(out.parent, needed, f"the export to {out.name}")

    def missing(self, directory: Path) -> int:
        """How many files of weights are not in `directory`."""
        return sum(not is_complete(directory, shard) for shard in self.shards)

    def finish(self, partial: Path, out: Path) -> None:
        """Renames the directory if no file is missing any more; otherwise another process will."""
        missing = self.missing(partial)
        if missing or not (partial / "config.json").is_file():
            if partial.is_dir():
                log.info("%d of %d files are left to the other processes", missing, len(self.shards))
            return
        try:
            self._say_what_is_kept(partial)
        except FileNotFoundError:  # another process saw the last file at the same moment
            return
        for left in partial.glob(".model*.safetensors.*"):  # left by a killed process
            left.unlink(missing_ok=True)
        try:
            (partial / PLAN).unlink(missing_ok=True)
            publish(partial, out)
        except FileNotFoundError:  # another process saw the last file at the same moment
            return
        nbytes = sum(shard.nbytes for shard in self.shards)
        log.info("exported %.2f GB in %s to %s", nbytes / 1e9, counted(len(self.shards), "file"), out)


def _start(record: Path, base: str | None) -> HFDirectorySource | None:
    """The weights to compare with: `base`, else the recorded start of training; logs why if there are none."""
    recorded = base or read_record(record).get("base")
    if from_scratch(record):
        return None
    try:
        if recorded is None:
            reason = "the checkpoint does not record what it started from; give --base"
        else:
            return HFDirectorySource(recorded)
    except ValueError as error:
        reason = f"{str(error).splitlines()[0]}; give --base"
    log.warning("how much of the training the export keeps is not measured: %s", reason)
    return None


def _recorded_base(record: Path, layers: int) -> str | None:
    """The recorded start of training, if it has weights with an MTP block."""
    base = read_record(record).get("base")
    return base if base is not None and has_mtp(base, layers) else None
