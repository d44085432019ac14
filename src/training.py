"""LightningCLI for this project: which classes, which defaults, and what is checked before any GPU time is spent."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from src.callbacks.expert_load import ExpertLoad
from src.callbacks.export_at_end import ExportAtEnd
from src.callbacks.loss_spike import LossSpike
from src.callbacks.run_record import RunRecord
from src.callbacks.step_checkpoint import LAST, StepCheckpoint, checkpoint_folder, step_of
from src.callbacks.throughput import Throughput
from src.datamodules import SFTDataModule
from src.datamodules.check import check
from src.datamodules.check_html import page
from src.datamodules.check_text import report_lines, verdict
from src.datamodules.reader import expand
from src.datamodules.tokenizer import load_tokenizer
from src.models.deepseek_v3 import load_config
from src.models.sft_module import SFTModule
from src.strategies.parallel_dims import ParallelDims


class TrainingCLI(LightningCLI):
    """`fit` and `validate`.

    Raises:
        ValueError: the config asks for what cannot be trained, or `fit` would write over a run that is there.
    """

    def __init__(self, args: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(
            SFTModule,
            SFTDataModule,
            save_config_callback=None,  # each checkpoint carries the config; this one refuses a second run
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args) if args is not None else None,
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportAtEnd, "export")

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        if settings.data.tokenizer is None:  # not a link, which could not be set by hand
            settings.data.tokenizer = settings.model.pretrained
        root = settings.trainer.default_root_dir or "."
        if settings.ckpt_path is None and not settings.model.from_scratch:
            _check_weights(settings.model.pretrained)
        for files in (settings.data.train_files if self.subcommand == "fit" else None, settings.data.val_files):
            if files:
                expand(files)  # refuses a pattern that matches nothing
        if settings.ckpt_path is not None:
            settings.ckpt_path = str(_find_checkpoint(settings.ckpt_path, root))
            if self.subcommand == "fit":
                _refuse_older(Path(settings.ckpt_path), root)
        elif self.subcommand == "fit":
            _refuse_other_run(root)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        self.datamodule.tokenizer = load_tokenizer(self.datamodule.tokenizer_spec)
        _check_data_fits_model(self.datamodule, self.model.config, self.model.pretrained)
        settings = self.config[self.subcommand]
        self._dump_config()
        config = yaml.safe_dump(self.config_dump, sort_keys=False)
        record = RunRecord(config, settings.model.pretrained, self.datamodule.tokenizer.name_or_path)
        self.trainer_defaults["callbacks"] = [Throughput(), ExpertLoad(), LossSpike(), record]
        if settings.trainer.logger in (None, True):
            # One folder for all of a run's sessions: no version_N.
            kwargs["logger"] = TensorBoardLogger(
                settings.trainer.default_root_dir or ".", name="tensorboard", version=""
            )
        if settings.trainer.logger is not False:
            self.trainer_defaults["callbacks"].append(LearningRateMonitor("step"))
        trainer = super().instantiate_trainer(**kwargs)
        # After the last checkpoint, which an export that fails must not cost.
        trainer.callbacks.sort(key=lambda callback: isinstance(callback, ExportAtEnd))  # type: ignore[attr-defined]
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Set on the trainer, so that the module knows while it builds the model; as an argument it would not.
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        self.trainer.ckpt_path = kwargs.pop("ckpt_path")
        return kwargs

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            loss = float(self.trainer.callback_metrics["val/loss"])
            print(f"val/loss {loss:.8f}")


class CheckDataCLI(TrainingCLI):
    """`check-data`: takes every argument of `fit`, builds neither model nor trainer, and exits with 1 where the data
    is wrong."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, run=False, parser_kwargs={"prog": "python -m src.cli check-data"})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(pl.Trainer, "fit", skip=LightningCLI.subcommands()["fit"])
        parser.add_argument("--show", type=int, default=0, help="print the first N conversations of each set")
        parser.add_argument("--html", type=str | None, default=None, help="write the report to this file too")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Of `fit`'s checks those of data alone are made, in `instantiate_classes`."""

    def instantiate_classes(self) -> None:
        settings = self.config
        data = SFTDataModule(**settings.data.as_dict())
        spec = settings.data.tokenizer or settings.model.pretrained
        data.tokenizer = load_tokenizer(spec)
        problems: list[str] = []
        pretrained, replicas = settings.model.pretrained, None
        if (Path(pretrained) / "config.json").is_file():  # the model may be on the cluster alone
            try:
                _check_data_fits_model(data, load_config(pretrained), pretrained)
            except ValueError as error:
                problems.append(str(error))
        else:
            print(f"{pretrained} has no config.json here: max_length and tokenizer are not compared with the model's")
        try:
            replicas = _data_parallel_size(settings.trainer)
        except ValueError as error:
            problems.append(str(error))
        reports = check(data, replicas, settings.trainer.accumulate_grad_batches, settings.show)
        reports[0].problems[:0] = problems
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print("\n".join(report_lines(reports, data.tokenizer, colour)))
        if settings.html:
            Path(settings.html).write_text(page(reports, data.tokenizer, "check-data"), encoding="utf-8")
        wrong = sum(report.wrong for report in reports)
        print(f"\n{verdict(wrong)}")
        if wrong:
            raise SystemExit(1)


def _data_parallel_size(trainer: Namespace) -> int | None:
    """None where the number of devices is known on the cluster alone (auto, -1)."""
    devices = len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices
    if not str(devices).isdecimal():
        return None
    options = trainer.strategy.get("init_args") if isinstance(trainer.strategy, Namespace) else None
    sp = options.get("sequence_parallel_size", 1) if options else 1
    return ParallelDims(trainer.num_nodes * int(devices), sp).dp


def _check_data_fits_model(data: SFTDataModule, config: Any, pretrained: str) -> None:
    assert data.tokenizer is not None
    limit, length = config.max_position_embeddings, data.options.max_length
    if length > limit:
        raise ValueError(
            f"data.max_length {length} is above the model's max_position_embeddings {limit} "
            f"({pretrained}/config.json); lower it."
        )
    if len(data.tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer {data.tokenizer.name_or_path} has {len(data.tokenizer)} tokens, the model a vocab_size of "
            f"{config.vocab_size}: they do not belong together."
        )


def _find_checkpoint(path: str, root: str) -> Path:
    # A run killed right after a checkpoint appeared has left the link at the one before.
    found = (_newest(root) or checkpoint_folder(root) / LAST) if path == "last" else Path(path)
    if not found.is_dir():
        raise ValueError(
            f"--ckpt_path {path}: there is no checkpoint {found}. "
            "Leave --ckpt_path out to start a new run, or set trainer.default_root_dir to the run's folder."
        )
    return found.resolve()


def _check_weights(directory: str) -> None:
    if not any(Path(directory).glob("*.safetensors")):
        raise ValueError(
            f"{directory} holds no weights (*.safetensors): give the model's directory with --model.pretrained, "
            "or --model.from_scratch true for random ones."
        )


def _newest(root: str) -> Path | None:
    checkpoints = [p for p in checkpoint_folder(root).glob("step=*.ckpt") if step_of(p) >= 0]
    return max(checkpoints, key=step_of, default=None)


def _refuse_older(checkpoint: Path, root: str) -> None:
    newest = _newest(root)
    if newest is not None and checkpoint.parent == newest.parent.resolve() and step_of(checkpoint) < step_of(newest):
        raise ValueError(
            f"--ckpt_path {checkpoint} is older than {newest.name} beside it, which the run would come to write again. "
            "Move the newer ones away, or give --ckpt_path last."
        )


def _refuse_other_run(root: str) -> None:
    newest = _newest(root)
    if newest is not None:
        raise ValueError(
            f"{newest.parent} holds checkpoints of an earlier run, the newest {newest.name}. "
            "Give --ckpt_path last to continue it, another --trainer.default_root_dir to start a new one, "
            "or remove the folder."
        )
