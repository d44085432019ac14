"""LightningCLI for this project: which classes, which defaults, and what is checked before any GPU time is spent."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from src.callbacks.expert_load import ExpertLoad
from src.callbacks.loss_spike import LossSpike
from src.callbacks.run_record import RunRecord
from src.callbacks.step_checkpoint import LAST, StepCheckpoint, checkpoint_folder, step_of
from src.callbacks.throughput import Throughput
from src.datamodules import SFTDataModule
from src.datamodules.reader import expand
from src.datamodules.tokenizer import load_tokenizer
from src.models.sft_module import SFTModule


class TrainingCLI(LightningCLI):
    """`fit` and `validate`.

    Raises:
        ValueError: the config asks for what cannot be trained, or `fit` would write over a run that is there.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            SFTModule,
            SFTDataModule,
            save_config_callback=None,  # each checkpoint carries the config; this one refuses a second run
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args) if args is not None else None,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")

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
        self._check_data_fits_model()
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
        return super().instantiate_trainer(**kwargs)

    def _check_data_fits_model(self) -> None:
        config, data = self.model.config, self.datamodule
        data.tokenizer = load_tokenizer(data.tokenizer_spec)
        limit, length = config.max_position_embeddings, data.options.max_length
        if length > limit:
            raise ValueError(
                f"data.max_length {length} is above the model's max_position_embeddings {limit} "
                f"({self.model.pretrained}/config.json); lower it."
            )
        if len(data.tokenizer) > config.vocab_size:
            raise ValueError(
                f"the tokenizer {data.tokenizer_spec} has {len(data.tokenizer)} tokens, the model a vocab_size of "
                f"{config.vocab_size}: they do not belong together."
            )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Set on the trainer, so that the module knows while it builds the model; as an argument it would not.
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        self.trainer.ckpt_path = kwargs.pop("ckpt_path")
        return kwargs

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            loss = float(self.trainer.callback_metrics["val/loss"])
            print(f"val/loss {loss:.8f}")


def _find_checkpoint(path: str, root: str) -> Path:
    found = checkpoint_folder(root) / LAST if path == "last" else Path(path)
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
