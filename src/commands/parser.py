"""The parser of every command that takes `fit`'s arguments."""

from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

PRINT_CONFIG = "--print_config"
SHARED = ("seed_everything", "ckpt_path", "weights_only")  # by all commands, and in no group


class Parser(LightningArgumentParser):
    """Lightning's, whose `--print_config` prints what every command reads back."""

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

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with 2 and the message alone, which is long enough to be overlooked below 40 lines of usage."""
        self.exit(2, f"error: {message}\n")
