"""What a checkpoint carries beside ZeRO's shards, so that it can be understood and exported alone."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from typing_extensions import override

from src.checkpoints.provenance import git_revision, package_versions
from src.errors import UserError

from .loggers import spare_the_run


def _license(directory: Path) -> str | None:
    """The licence in the header of a model card, its README.md."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    before, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    header, closed, _ = rest.partition("\n---")
    try:
        fields = yaml.safe_load(header) if closed and not before.strip() else None
    except yaml.YAMLError:  # somebody's card, written for people
        return None
    return fields.get("license") if isinstance(fields, dict) else None


class RunRecord(pl.Callback):
    """Puts files into each checkpoint: config.yaml and run.json of the run, `hf/` with what an export needs.

    run.json says where the weights came from and under which licence, the code's revision and the packages' versions,
    the data's hash, counts and mixture, the processes, the optimizer steps and tokens trained, and the newest losses
    with their steps. When training starts, the record so far and the configuration go to every logger as
    hyperparameters, and as text to those that take it (TensorBoard).

    Args:
        config: the run's whole configuration, as YAML.
        model_directory: where the weights or the config.json came from.
        tokenizer_directory: where the tokenizer and its chat template came from; None where there is none.
        tokenizer_files: name to text of what is kept in place of that directory's own files, or beside them.
    """

    def __init__(
        self,
        config: str,
        model_directory: str,
        tokenizer_directory: str | None,
        tokenizer_files: dict[str, str] | None = None,
    ) -> None:
        self.config = config
        self.model_directory = model_directory
        self.tokenizer_directory = tokenizer_directory
        self._tokenizer_files = {f"hf/{name}": text for name, text in (tokenizer_files or {}).items()}
        base = Path(model_directory).absolute()
        self._origin: dict[str, Any] = {"base": str(base)}
        if (license_name := _license(base)) is not None:
            self._origin["license"] = license_name
        self._origin |= {"git_revision": git_revision(), "versions": package_versions()}
        self._tokens = 0
        self._losses: dict[str, dict[str, float]] = {}
        self._step = 0  # the optimizer step that was counted last

    def _facts(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The part of the record that stays the same during a run."""
        data = getattr(trainer.datamodule, "facts", None)  # type: ignore[attr-defined]
        return self._origin | ({} if data is None else {"data": data()})

    def side_files(self, trainer: pl.Trainer) -> dict[str, Any]:
        """What `write_run_files` in src/checkpoints takes, as of now."""
        progress = {"world_size": trainer.world_size, "step": trainer.global_step, "tokens": self._tokens}
        record = self._facts(trainer) | progress | {"losses": self._losses}
        return {
            "files": {"config.yaml": self.config, "run.json": json.dumps(record, indent=2)} | self._tokenizer_files,
            "model_directory": self.model_directory,
            "tokenizer_directory": self.tokenizer_directory,
        }

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:  # the data is set up, and no logger has written its own yet
            for logger in trainer.loggers:
                with spare_the_run(Path(logger.save_dir or "."), logger):
                    logger.log_hyperparams({**self._facts(trainer), "config": yaml.safe_load(self.config)})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            text = yaml.safe_dump(self._facts(trainer), sort_keys=False)
            for logger in trainer.loggers:
                with spare_the_run(Path(logger.save_dir or "."), logger):
                    add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
                    if add_text is not None:
                        add_text("run", f"```yaml\n{text}```", global_step=trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:  # not in the middle of accumulation
            self._step = trainer.global_step
            self._tokens += int(batch["step_tokens"])

    # A step's training loss is logged after the callbacks' own batch end: these hooks are the first to see it.
    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._note(trainer, "train/loss")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note(trainer, "train/loss")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note(trainer, "train/loss")
        for name in sorted(trainer.callback_metrics):  # of each named set too
            if name.startswith("val/") and name.endswith("/loss"):
                self._note(trainer, name)

    def _note(self, trainer: pl.Trainer, name: str) -> None:
        noted = self._losses.get(name, {}).get("step")
        if name in trainer.callback_metrics and not trainer.sanity_checking and noted != trainer.global_step:
            self._losses[name] = {"value": float(trainer.callback_metrics[name]), "step": trainer.global_step}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self._tokens, "losses": self._losses}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._tokens, self._losses = state_dict["tokens"], state_dict["losses"]

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The strategy writes them into the checkpoint's directory before it appears.
        checkpoint["side_files"] = self.side_files(trainer)


def run_record(trainer: pl.Trainer, asked_by: pl.Callback) -> RunRecord:
    """The trainer's RunRecord, which `asked_by` needs.

    Raises:
        ValueError: it has none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunRecord):
            return callback
    raise UserError(
        f"{type(asked_by).__name__} needs the callback RunRecord, which knows the run's config.json and tokenizer"
    )
