"""The parser of every command that takes `fit`'s arguments."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from src.commands.one_line import OneLineParser
from src.commands.ranges import CHOICES

PRINT_CONFIG = "--print_config"
SHARED = ("seed_everything", "ckpt_path", "weights_only")  # by all commands, and in no group


class Parser(OneLineParser, LightningArgumentParser):
    """Lightning's, whose `--print_config` prints what every command reads back."""

    choices = CHOICES

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any
    ) -> Namespace:
        if args is not None:  # jsonargparse would print once the next file is read, without what follows
            args = sorted(args, key=lambda arg: arg.startswith(PRINT_CONFIG))
        return super().parse_args(args, *others, **kwargs)

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        settings = namespace.clone()
        if "trainer" in namespace:  # not the arguments of one class
            for name, value in vars(namespace).items():
                if not isinstance(value, Namespace) and name not in SHARED:  # a command's own, `plan --explain`
                    settings.pop(name)
        return super().dump(settings, *args, **kwargs)
