"""What DeepSpeedSPStrategy does with a run's state: saves it beside training, resumes on any layout, exports it."""

import os
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from typing_extensions import override

from src.checkpoints.manifest import MANIFEST, check_manifest
from src.checkpoints.run_files import client_state
from src.checkpoints.saving import CheckpointSaver
from src.checkpoints.zero_reader import EXPERT_PARALLEL_SIZE, OPTIMIZER_NAMES, ZeroCheckpointSource
from src.errors import UserError
from src.weights.kept import Kept
from src.weights.output import Dtype
from src.weights.source import WeightSource

from .fail_together import fail_together
from .live_partitions import export_live
from .random_state import random_state, set_random_state
from .reshard import continue_rates, optimizer_names, restore
from .rounding import NEAREST
from .sampled_change import sample_changes

NFS_PATIENCE = 90.0  # seconds: clients keep what they know of a folder for up to 60


class CheckpointingStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy, its checkpoints durable and of any layout."""

    fail_together = staticmethod(fail_together)  # for callbacks and data, which reach ranks through the strategy
    accept_unlisted = False  # files of a checkpoint that its manifest does not list, unchecked
    expert_parallel_size = 1
    _saver: CheckpointSaver | None = None
    _rounding = NEAREST

    def _save_through(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Has `engine` save as `src.checkpoints.saving` does; to be called by all ranks."""
        engine.checkpoint_engine = self._saver = CheckpointSaver(os.environ["MASTER_ADDR"])
        engine._copy_recovery_script = lambda folder: None  # written past the checkpoint engine; `export` does its work

    def export(
        self, run_files: dict[str, Any], out: Path, dtype: Dtype, max_shard_size: str, measure: bool = True
    ) -> None:
        """Writes the weights as they stand as a Hugging Face directory; see `export_live`."""
        assert self.lightning_module is not None
        model: Any = self.lightning_module.model
        with self._timed_as_checkpoint():
            export_live(self.deepspeed_engine, model, self.root_device, run_files, out, dtype, max_shard_size, measure)

    def sample_changes(self, base: WeightSource) -> Callable[[], Kept] | None:
        """What compares a sample of weights, masters and the base; see `sampled_change`."""
        assert self.lightning_module is not None
        model = cast(nn.Module, self.lightning_module.model)
        return sample_changes(self.deepspeed_engine, model, base, self.root_device)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """A directory that appears whole or not at all (`src.checkpoints.saving`).

        Args:
            storage_options: a dictionary. `asynchronous`: return as soon as the state is copied to host memory, and
                write beside training; `wait_for_checkpoint` tells what became of it. `then`: called on rank 0, maybe on
                another thread, with the path of the complete checkpoint.

        Raises:
            ValueError: there is such a checkpoint already.
            SaveFailed: it could not be written; never where it is asynchronous.
        """
        assert self._saver is not None, "only a run that trains has a checkpoint to save"
        options = storage_options or {}
        asynchronous = options.get("asynchronous", False)
        aside = self._saver.begin(Path(self.broadcast(str(filepath))), asynchronous=asynchronous)
        side_files = checkpoint.pop("side_files", None)
        checkpoint |= {"random_state": random_state(), OPTIMIZER_NAMES: optimizer_names(self.deepspeed_engine)}
        checkpoint[EXPERT_PARALLEL_SIZE] = self.expert_parallel_size
        super().save_checkpoint(checkpoint, aside)
        self._saver.start(side_files, options.get("then"))
        if not asynchronous:
            self._saver.wait()

    def wait_for_checkpoint(self) -> None:
        """Returns when the last save has ended. Raises SaveFailed where it failed; called by all ranks."""
        if self._saver is not None:
            with self._timed_as_checkpoint():
                self._saver.wait()

    def _timed_as_checkpoint(self) -> AbstractContextManager[str]:
        """Tells the profiler what Lightning does of a save, and whoever watches how long a phase may be."""
        assert self.lightning_module is not None
        profiler: Any = self.lightning_module.trainer.profiler  # type: ignore[attr-defined]
        return cast(AbstractContextManager[str], profiler.profile("save_checkpoint"))

    @override
    def teardown(self) -> None:
        if self._saver is not None:
            self._saver.close()
        module = cast(Any, self.lightning_module)
        if module is not None and any(parameter.is_meta for parameter in module.parameters()):
            module.model = None  # whose building failed: Lightning moves what is left to the host
        super().teardown()

    def agree_on_checkpoint(self) -> None:
        """Has all ranks go on from rank 0's checkpoint; called by all of them, before anything of it is read.

        Each rank has looked for the newest by itself, and over NFS a listing may be a minute old.

        Raises:
            ValueError: on every rank: some have found no checkpoint, or one whose manifest differs.
        """
        assert self.lightning_module is not None
        trainer: Any = self.lightning_module.trainer
        choices: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(choices, None if trainer.ckpt_path is None else str(trainer.ckpt_path))
        if choices[0] is None and not any(choices):
            return
        without = [rank for rank, path in enumerate(choices) if (path is None) != (choices[0] is None)]
        if choices[0] is None or without:
            path = next(path for path in choices if path is not None)
            raise UserError(
                f"ranks {[rank for rank, path in enumerate(choices) if path is None]} see no checkpoint where others "
                f"see {path}: their listing is old, or the folder is not shared. Start again, with --ckpt_path {path}."
            )
        if str(trainer.ckpt_path) != choices[0]:
            trainer.ckpt_path = choices[0]
        checkpoint, digests = Path(choices[0]), [""] * len(choices)
        first = [_digest(checkpoint, 0) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(first)
        patience = NFS_PATIENCE if first[0].startswith("manifest") else 0
        dist.all_gather_object(digests, _digest(checkpoint, patience) if dist.get_rank() else first[0])
        if others := [f"rank {rank}: {digest}" for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise UserError(
                f"{choices[0]} is not the same checkpoint on all ranks: rank 0: {digests[0]}; {', '.join(others)}. "
                "Check that its folder is mounted on every node."
            )

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """What Lightning saved; it then has the data checked, and calls `load_model_state_dict`.

        Raises:
            ValueError: a file of the checkpoint is missing or torn.
        """
        assert self.lightning_module is not None
        checkpoint_path = str(self.lightning_module.trainer.ckpt_path)  # rank 0's: `agree_on_checkpoint`
        if self._is_fitting:  # otherwise `load` has read the weights already, on whatever layout
            self._check_manifest(checkpoint_path)
        with self.fail_together():
            state = client_state(checkpoint_path)
        return state

    def _check_manifest(self, checkpoint: str) -> None:
        check_manifest(
            checkpoint, accept_unlisted=self.accept_unlisted, rank=self.global_rank, world_size=self.world_size
        )

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Goes on with a run on whatever layout: weights, optimizer, learning rate, counters, random state.

        Settings are this run's, a lower learning rate, say; what has happened so far is the checkpoint's.

        Raises:
            ValueError: the checkpoint is of another model, or of other trained parameters.
        """
        if not self._is_fitting:
            return
        assert self.lightning_module is not None
        with self.fail_together():
            source = ZeroCheckpointSource(str(self.lightning_module.trainer.ckpt_path))
        restore(self.deepspeed_engine, cast(nn.Module, self.lightning_module.model), source, self._rounding)
        self.deepspeed_engine.global_steps = checkpoint["global_steps"]
        self.deepspeed_engine.skipped_steps = checkpoint["skipped_steps"]
        # Lightning loads these states next.
        continue_rates([config.scheduler for config in self.lr_scheduler_configs], checkpoint["lr_schedulers"])
        set_random_state(checkpoint["random_state"])

    @property
    def _is_fitting(self) -> bool:
        return self.lightning_module is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING


def _digest(checkpoint: Path, patience: float) -> str:
    """Of its manifest, for which it waits `patience` seconds, as a listing over NFS may be old."""
    manifest, until = checkpoint / MANIFEST, time.monotonic() + patience
    while not manifest.is_file() and time.monotonic() < until:
        time.sleep(0.5)
    try:
        return f"manifest {zlib.crc32(manifest.read_bytes()):08x}" if manifest.is_file() else "no manifest"
    except OSError as error:
        return str(error)
