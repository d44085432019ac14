"""The parser of every command that takes `fit`'s arguments."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from src.commands.one_line import OneLineParser
from src.commands.options import STRATEGY_NAMES
from src.commands.ranges import CHOICES

PRINT_CONFIG = "--print_config"
SHARED = ("seed_everything", "ckpt_path", "weights_only")  # of all commands, in no group


def _without_own_strategy(args: Sequence[str]) -> list[str]:
    """The arguments without `--trainer.strategy` naming our class as text, which is the default anyway."""
    kept, at = list[str](), 0
    while at < len(args):
        name, equals, value = args[at].partition("=")
        value = value if equals else "".join(args[at + 1 : at + 2])
        ours = name == "--trainer.strategy" and value in STRATEGY_NAMES
        if not ours:
            kept.append(args[at])
        at += 2 if ours and not equals else 1
    return kept


class Parser(OneLineParser, LightningArgumentParser):
    """Lightning's parser, with a `--print_config` that every command reads back."""

    choices = CHOICES

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any
    ) -> Namespace:
        if args is not None:  # jsonargparse would print once the next file is read, without what follows
            args = sorted(_without_own_strategy(args), key=lambda arg: arg.startswith(PRINT_CONFIG))
        return super().parse_args(args, *others, **kwargs)

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        settings = namespace.clone()
        if "trainer" in namespace:  # not the arguments of one class
            for name, value in vars(namespace).items():
                if not isinstance(value, Namespace) and name not in SHARED:  # a command's own, `plan --explain`
                    settings.pop(name)
        return super().dump(settings, *args, **kwargs)
