"""Checkpoints that are complete or absent, written while training continues.

The steps of a save; the indented ones run on a thread of this rank, or in the foreground if asked for:

    begin     the previous save has ended; rank 0 makes the folder X.ckpt.incomplete
    save      DeepSpeed hands over a state for each of this rank's files: copied to host memory
    start     all ranks exchange problems and bytes: what cannot fit on the disk fails here
        every rank writes, checksums and syncs its files, and reports to rank 0
        rank 0 waits for all reports, adds the run's own files and the manifest, syncs the folders, renames
        X.ckpt.incomplete to X.ckpt and calls `then`, which moves the link `last.ckpt` and removes older checkpoints
    wait      every rank learns the outcome

The threads use no collectives. They report through a key-value store, which needs neither the disk, which may be full,
nor the main threads, which are training. A failed save affects neither training nor an earlier checkpoint.
"""

import errno
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from src.checkpoints.host_copy import HostMemory, host_copy, nbytes
from src.checkpoints.manifest import MANIFEST, FileRecord, dump_manifest
from src.checkpoints.run_files import write_run_files
from src.checkpoints.safe_load import load_safely
from src.checkpoints.save_problem import Problem, failure
from src.disk.durable import INCOMPLETE, CheckedFile, make_folder, publish, seal
from src.disk.space import Room
from src.errors import UserError

log = logging.getLogger(__name__)

TAG = "checkpoint"  # the folder of DeepSpeed's files, whose name the file `latest` holds
# After so many seconds without a byte from any rank, those that have not reported are given up: while training
# continues, when a slow disk is likelier than a lost rank; and after an error, when it is not.
PATIENCE, PATIENCE_AFTER_ERROR = 1800.0, 60.0
_POLL = 0.02, 2.0  # seconds, growing from the first to the second


class SaveFailed(RuntimeError):
    """Says which checkpoint was not saved, why, and what to do; training and earlier checkpoints are unaffected."""


@dataclass
class _Save:
    """One save: where it goes, and what this rank is to write."""

    number: int
    final: Path
    asynchronous: bool
    states: list[tuple[Path, Any]] = field(default_factory=list)
    problem: Problem | None = None  # this rank's, before anything is written
    needed: int = 0  # bytes of all ranks
    room: Room | None = None  # the smallest of all ranks', if too small
    side_files: dict[str, Any] | None = None
    then: Callable[[Path], None] | None = None
    begun: float = field(default_factory=time.monotonic)
    held_up: float = 0.0  # save stall in seconds

    @property
    def aside(self) -> Path:
        return self.final.with_name(self.final.name + INCOMPLETE)


class CheckpointSaver(CheckpointEngine):
    """The engine's `checkpoint_engine`: what DeepSpeed saves through it is written as described above.

    `begin`, `start` and `wait` are collective, and so is making one: called by the main threads of all ranks in the
    same order, with a process group at hand. One save is in flight at a time.

    Args:
        host: a name or address of rank 0's machine that all ranks reach.
    """

    def __init__(self, host: str) -> None:
        super().__init__()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._store = _store(host, self._rank)
        self._memory = HostMemory()
        self._patience = PATIENCE
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None  # on rank 0: why the last save failed; cleared by success

    # -- for the strategy -----------------------------------------------------------------------------------------

    def begin(self, final: Path, *, asynchronous: bool) -> Path:
        """Waits for the previous save and returns the folder for DeepSpeed to save into.

        Raises:
            ValueError: there is a checkpoint `final` already.
        """
        self._join()
        self._memory.reuse()
        number = 1 if self._save is None else self._save.number + 1
        save = self._save = _Save(number, final, asynchronous)
        exists = [False]
        if self._rank == 0:
            try:
                exists = [final.exists()]
                if not exists[0]:
                    make_folder(final.parent)
                    shutil.rmtree(save.aside, ignore_errors=True)
                    (save.aside / TAG).mkdir(parents=True)
            except OSError as error:
                save.problem = Problem.of(self._rank, save.aside / TAG, error)
        dist.broadcast_object_list(exists)
        if exists[0]:
            raise UserError(
                f"{final} exists already, and checkpoints are never overwritten; move it away, or save to another path."
            )
        self._error = f"{final} was not saved."  # unless it completes
        return save.aside

    def start(self, side_files: dict[str, Any] | None = None, then: Callable[[Path], None] | None = None) -> None:
        """Starts to write what DeepSpeed has handed over; if not asynchronous, returns when it is written.

        Args:
            side_files: what `write_run_files` takes after the directory, of rank 0.
            then: called on rank 0 with the checkpoint's path as soon as it is complete and durable.
        """
        save = self._save
        assert save is not None
        save.side_files, save.then = side_files, then
        reports: list[Any] = [None] * self._world_size
        try:
            room = Room.at(save.final.parent)
        except OSError as error:  # raising here would leave the other ranks waiting
            room = Room("", "", 0)
            save.problem = save.problem or Problem.of(self._rank, save.final.parent, error)
        dist.all_gather_object(reports, (save.problem, sum(nbytes(state) for _, state in save.states), room))
        problems = [problem for problem, _, _ in reports if problem is not None]
        save.needed = sum(size for _, size, _ in reports)
        # Every rank's, so that a node that has not mounted the folder does not fill its own disk.
        least = min((room for _, _, room in reports), key=lambda room: room.free)
        if not problems and save.needed > least.free:
            save.room, problems = least, [Problem("The disk is too small for it", errno.ENOSPC)]
        if problems:
            save.states.clear()
            if self._rank == 0:
                self._fail(save, problems)
        elif save.asynchronous:
            save.held_up = time.monotonic() - save.begun
            self._thread = threading.Thread(target=self._write, args=(save,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(save)

    def wait(self) -> None:
        """Returns when the last save has ended.

        Raises:
            SaveFailed: it failed; on every rank.
        """
        self._join()
        error = [self._error]
        dist.broadcast_object_list(error)
        if error[0] is not None:
            raise SaveFailed(error[0])

    def close(self) -> None:
        """Ends the save in flight, if any, without the other ranks' main threads, which an error may have ended."""
        self._patience = PATIENCE_AFTER_ERROR
        if self._thread is not None and self._thread.is_alive():
            log.info("finishing the checkpoint that is being written; a kill here costs that one alone")
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # -- for DeepSpeed --------------------------------------------------------------------------------------------

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing: `begin` has."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: `begin` has, and an error raised here would leave the other ranks waiting."""

    def save(self, state_dict: Any, path: str) -> None:
        assert self._save is not None
        try:
            state = host_copy(state_dict, self._memory) if self._save.asynchronous else state_dict
            self._save.states.append((Path(path), state))
        except Exception as error:  # out of memory, say: raised here it would leave the other ranks waiting
            self._save.problem = Problem.of(self._rank, Path(path), error)

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_safely(path, map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True

    def is_decoupled(self) -> bool:
        """True, so that DeepSpeed itself writes no file `latest`."""
        return True

    # -- on the thread --------------------------------------------------------------------------------------------

    def _write(self, save: _Save) -> None:
        files: dict[str, list[Any]] = {}
        problem: Problem | None = None
        while save.states and problem is None:
            path, state = save.states.pop(0)
            try:
                with CheckedFile(path, lambda count: self._store.add(f"{save.number}/written", count)) as file:
                    torch.save(state, file)  # type: ignore[arg-type]  # it needs no more than write and flush
                files[str(path.relative_to(save.aside))] = [file.bytes, file.crc32]
            except Exception as error:
                problem = Problem.of(self._rank, path, error)
        save.states.clear()
        report = {"files": files, "problem": None if problem is None else [problem.text, problem.errno]}
        self._store.set(_key(save, self._rank), json.dumps(report))
        if self._rank == 0:
            self._complete(save)

    def _complete(self, save: _Save) -> None:
        """On rank 0: turns the folder into a checkpoint once every rank has written its part."""
        try:
            reports = self._hear(save)
            problems = [Problem(*report["problem"]) for report in reports if report["problem"] is not None]
            if problems:
                return self._fail(save, problems)
            files = {
                name: FileRecord(size, crc32, rank)
                for rank, report in enumerate(reports)
                for name, (size, crc32) in report["files"].items()
            }
            (save.aside / "latest").write_text(TAG)
            if save.side_files is not None:
                write_run_files(save.aside, **save.side_files)
            for file in save.aside.rglob("*"):
                name = str(file.relative_to(save.aside))
                if file.is_file() and name not in files:
                    files[name] = FileRecord(*seal(file), rank=0)
            with CheckedFile(save.aside / MANIFEST) as manifest:
                manifest.write(dump_manifest(files, self._world_size).encode())
            publish(save.aside, save.final)
        except Exception as error:
            return self._fail(save, [Problem.of(self._rank, save.aside, error)])
        size, seconds = sum(record.bytes for record in files.values()), time.monotonic() - save.begun
        held_up = save.held_up or seconds
        log.info("%s: %.3g GB in %.1f s, save stall %.2f s", save.final, size / 1e9, seconds, held_up)
        self._error = None
        if save.then is not None:
            try:
                save.then(save.final)
            except OSError as error:
                self._error = f"{save.final} is complete, but the link to it is not: {error}"
                log.error(self._error)

    def _hear(self, save: _Save) -> list[dict[str, Any]]:
        """Every rank's report, in rank order."""
        keys = [_key(save, rank) for rank in range(self._world_size)]
        written, since, pause = -1, time.monotonic(), _POLL[0]
        while not self._store.check(keys):
            now = self._store.add(f"{save.number}/written", 0)
            if now != written:
                written, since = now, time.monotonic()
            elif time.monotonic() - since > self._patience:
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise TimeoutError(f"no word from ranks {missing}, and nothing written for {self._patience:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _POLL[1])
        return [json.loads(self._store.get(key)) for key in keys]

    # -- failing --------------------------------------------------------------------------------------------------

    def _fail(self, save: _Save, problems: list[Problem]) -> None:
        """On rank 0: removes the incomplete checkpoint, and says why in one message."""
        shutil.rmtree(save.aside, ignore_errors=True)
        self._error = failure(save.final, problems, save.needed, save.room or Room.at(save.final.parent))
        log.error(self._error)


def _key(save: _Save, rank: int) -> str:
    return f"{save.number}/{rank}"


def _store(host: str, rank: int) -> dist.Store:
    """A key-value store of all ranks, separate from the process group's own."""
    master = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [master.port if master is not None else 0]
    dist.broadcast_object_list(port)
    return master or dist.TCPStore(host, port[0], is_master=False, wait_for_workers=False)
