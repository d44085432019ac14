"""LightningCLI for this project: which classes, which defaults, and what is checked before any GPU time is spent."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from src.callbacks.expert_load import ExpertLoad
from src.callbacks.export_at_end import ExportAtEnd
from src.callbacks.loggers import RunLogger, count_steps_from_one, outlive_full_disks
from src.callbacks.loss_spike import LossSpike
from src.callbacks.out_of_memory import OutOfMemory
from src.callbacks.progress import Progress
from src.callbacks.rounding_kept import RoundingKept
from src.callbacks.run_record import RunRecord
from src.callbacks.samples import Samples
from src.callbacks.step_checkpoint import StepCheckpoint
from src.callbacks.stop import Stop
from src.callbacks.throughput import Throughput
from src.callbacks.watchdog import Watchdog
from src.callbacks.weights_checkpoint import WeightsCheckpoint
from src.checkpoints.manifest import check_manifest
from src.commands.checks import (
    check_data_fits_model,
    check_experts_divide,
    check_weights,
    find_checkpoint,
    newest_checkpoint,
    refuse_older,
    refuse_other_run,
    rounded_to_bf16,
)
from src.commands.config_files import ConfigFile
from src.commands.instances import errors_as_raised
from src.commands.mtp_weight import mtp_loss_weight
from src.commands.parser import Parser
from src.commands.planned import host_memory
from src.commands.ranges import check_ranges
from src.commands.run_lock import lock_run
from src.commands.writable import check_writable, places
from src.datamodules import SFTDataModule
from src.datamodules.files import expand
from src.datamodules.tokenizer import load_tokenizer, opening_files
from src.errors import UserError
from src.launcher import is_first_process
from src.models.sft_module import SFTModule
from src.preflight.node import usable_memory

# Every run needs these; Lightning's defaults are 1,000 epochs, no clipping, a loss logged every 50 steps.
TRAINER_DEFAULTS: dict[str, Any] = {
    "accelerator": "cuda",
    "precision": "bf16-true",
    "strategy": {"class_path": "src.strategies.DeepSpeedSPStrategy"},
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # has one line; config.json and `plan` say more
}


class TrainingCLI(LightningCLI):
    """`fit` and `validate`.

    Raises:
        ValueError: the config asks for what cannot be trained, or `fit` would write over a run that is there.
    """

    def __init__(self, args: Sequence[str] | None = None, **kwargs: Any) -> None:
        self._arguments = list(sys.argv[1:] if args is None else args)[1:]  # behind `fit` or `validate`
        super().__init__(
            SFTModule,
            SFTDataModule,
            save_config_callback=None,  # each checkpoint has the config; Lightning's callback refuses a second run
            parser_class=Parser,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args) if args is not None else None,
            **kwargs,
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={pl.__version__}"])
        parser: LightningArgumentParser = self.parser_class(**kwargs)
        text = "a YAML file of these options; may be given more than once, a later one over the earlier"
        parser.add_argument("-c", "--config", action=ConfigFile, help=text)
        return parser

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--accept_unlisted",
            type=bool,
            default=False,
            help="take files of --ckpt_path that its manifest does not list, or all where it has none, unchecked",
        )
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.add_lightning_class_args(WeightsCheckpoint, "weights")
        parser.add_lightning_class_args(ExportAtEnd, "export")
        parser.add_lightning_class_args(Stop, "stop")
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(RoundingKept, "rounding")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
            check_ranges(self.config[self.config.subcommand] if "subcommand" in self.config else self.config)
        except UserError as error:
            parser.error(str(error))

    @override
    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        _name_enums(settings)
        if settings.trainer.fast_dev_run and settings.trainer.accumulate_grad_batches > 1:
            rank_zero_info("fast_dev_run: each of its batches is an optimizer step, trainer.accumulate_grad_batches 1")
            settings.trainer.accumulate_grad_batches = 1
        if settings.data.tokenizer is None:  # a link of jsonargparse could not be set by hand
            settings.data.tokenizer = settings.model.pretrained
        root = settings.trainer.default_root_dir or "."
        if self.subcommand == "fit" and is_first_process():
            for option, place in places(settings).items():
                check_writable(option, place)
            lock_run(root)
        if settings.ckpt_path == "auto":
            settings.ckpt_path = "last" if newest_checkpoint(root) else None
        if settings.ckpt_path is None and not settings.model.from_scratch:
            check_weights(settings.model.pretrained)
            finer = rounded_to_bf16(settings.model.pretrained)
            if self.subcommand == "validate" and finer and "bf16" in str(settings.trainer.precision):
                rank_zero_warn(
                    f"the weights in {settings.model.pretrained} are {finer} and are rounded to bf16 here; "
                    "--trainer.precision 32-true computes the loss of the values that they have"
                )
        val_sets = (settings.data.val_files, *(settings.data.val_sets or {}).values())
        for files in (settings.data.train_files if self.subcommand == "fit" else None, *val_sets):
            if files:
                expand(files)  # refuses a pattern that matches nothing
        if settings.ckpt_path is not None:
            settings.ckpt_path = str(find_checkpoint(settings.ckpt_path, root))
            check_manifest(settings.ckpt_path, checksums=False, accept_unlisted=settings.accept_unlisted)
            if self.subcommand == "fit":
                refuse_older(Path(settings.ckpt_path), root)
        elif self.subcommand == "fit":
            refuse_other_run(root)
        asked, checkpoint = settings.model.mtp_loss_weight, settings.ckpt_path and Path(settings.ckpt_path)
        settings.model.mtp_loss_weight = mtp_loss_weight(settings.model, checkpoint)
        if asked is None:
            why = "the model has its block" if settings.model.mtp_loss_weight else "there is no block to train"
            rank_zero_info(f"multi-token prediction: mtp_loss_weight {settings.model.mtp_loss_weight}, {why}")
        if self.subcommand == "fit" and settings.trainer.accelerator != "cpu" and torch.cuda.is_available():
            say_host_memory(settings)

    @override
    def instantiate_classes(self) -> None:
        with errors_as_raised(self.parser):
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        self.datamodule.tokenizer = load_tokenizer(self.datamodule.tokenizer_spec)
        self.datamodule.check_command = shlex.join(["python", "-m", "src.cli", "check-data", *self._arguments])
        check_data_fits_model(self.datamodule, self.model.config, self.model.pretrained)
        settings = self.config[self.subcommand]
        check_experts_divide(settings.trainer, self.model.config.n_routed_experts)
        self._dump_config()
        config = yaml.safe_dump(self.config_dump, sort_keys=False)
        tokenizer = self.datamodule.tokenizer
        record = RunRecord(config, settings.model.pretrained, tokenizer.name_or_path, opening_files(tokenizer))
        self.trainer_defaults["callbacks"] = [Throughput(), ExpertLoad(), LossSpike(), OutOfMemory(), record]
        own_bar = any("ProgressBar" in callback.class_path for callback in settings.trainer.callbacks or [])
        if settings.trainer.enable_progress_bar is not False and not own_bar:
            self.trainer_defaults["callbacks"].append(Progress())
        if settings.trainer.logger in (None, True):
            # One folder for all sessions of a run, without version_N.
            kwargs["logger"] = RunLogger(
                settings.trainer.default_root_dir or ".", name="tensorboard", version="", default_hp_metric=False
            )
        if settings.trainer.logger is not False:
            self.trainer_defaults["callbacks"].append(LearningRateMonitor("step"))
        trainer = super().instantiate_trainer(**kwargs)
        for logger in trainer.loggers:
            if not isinstance(logger, RunLogger):
                outlive_full_disks(logger)
        count_steps_from_one(trainer)
        strategy: Any = trainer.strategy
        if hasattr(strategy, "wait_at_least"):
            strategy.wait_at_least(self._get(self.config_init, "watchdog").collective_minutes)
            strategy.accept_unlisted = settings.accept_unlisted
        # Export after the last checkpoint, so that a failing export does not cost it; stop after all other callbacks
        # have seen the step.
        trainer.callbacks.sort(key=lambda callback: isinstance(callback, (ExportAtEnd, Stop)))  # type: ignore[attr-defined]
        return trainer

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Set on the trainer, where the module finds it while it builds the model.
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        self.trainer.ckpt_path = kwargs.pop("ckpt_path")
        return kwargs

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            for name in ("val", *(f"val/{name}" for name in self.datamodule.val_sets)):
                loss = float(self.trainer.callback_metrics[f"{name}/loss"])
                print(f"{name}/loss {loss:.8f}")


def say_host_memory(settings: Namespace) -> None:
    """Says before allocating what host memory the run will take and when; warns if that is more than available."""
    with suppress(ValueError):  # of a strategy that the planner does not know
        said, too_much = host_memory(settings, usable_memory())
        if too_much:
            rank_zero_warn(f"{said}: the run is killed when it takes more; see `plan`")
        else:
            rank_zero_info(said)


def _name_enums(value: Any) -> None:
    """Replaces members of string enums, defaults of some Lightning callbacks that jsonargparse cannot print, by their
    strings; in place."""
    keys = range(len(value)) if isinstance(value, list) else vars(value) if isinstance(value, Namespace) else ()
    for key in list(keys):
        item = value[key]
        if isinstance(item, Enum) and isinstance(item, str):
            value[key] = str(item.value)
        else:
            _name_enums(item)
