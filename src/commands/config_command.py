"""Commands that take every argument of `fit` and build neither model nor trainer."""

from collections.abc import Sequence
from typing import ClassVar

import lightning.pytorch as pl
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from src.commands.options import add_own
from src.commands.training import TrainingCLI


class ConfigCommand(TrainingCLI):
    """Parses as `fit` does, then runs `run_command`; subclasses give `name`. `parser` and `config` are set by then."""

    name: ClassVar[str]

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, run=False, parser_kwargs={"prog": f"python -m src.cli {self.name}"})

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(pl.Trainer, "fit", skip=LightningCLI.subcommands()["fit"])
        add_own(parser, self.name)

    @override
    def before_instantiate_classes(self) -> None:
        """Skips `fit`'s checks of weights and checkpoints, which may be on the cluster only."""

    @override
    def instantiate_classes(self) -> None:
        self.run_command()

    def run_command(self) -> None:
        """Nothing, where only the arguments are wanted."""


def parse(name: str, args: Sequence[str]) -> tuple[ArgumentParser, Namespace]:
    """A command's parser and its arguments, parsed with all classes."""
    command = type("Parsed", (ConfigCommand,), {"name": name})(args)
    return command.parser, command.config
