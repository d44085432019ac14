"""Reads a command line without the heavy libraries, to refuse mistakes in well under a second.

The command's own parser reads it again, classes included; both use one list of options.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import Namespace

from src.commands.config_files import ConfigFile
from src.commands.help_text import CONFIG, help_text
from src.commands.one_line import OneLineParser
from src.commands.options import OF_FUNCTIONS, OWN, STRATEGY_CLASS, STRATEGY_NAMES, Option, add, options_of
from src.commands.ranges import CHOICES, check_ranges
from src.errors import UserError
from src.strategies.zero_limits import STRATEGY

HELP = ("-h", "--help")


class _Unsure(Exception):
    """Only the command's own parser can tell."""


class EarlyParser(OneLineParser):
    """`OneLineParser` over the list of options; sets `whole` to false if it left something out."""

    choices = CHOICES

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"python -m src.cli {command}", add_help=False, exit_on_error=True)
        self.whole, self.reading = True, True
        self.options = {option.name: option for option in options_of(command)}
        paths = (name.split(".")[:-1] for name in self.options)
        self.parents = {".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}
        if command not in OF_FUNCTIONS:
            self.add_argument("-c", "--config", action=ConfigFile, help=CONFIG)
        for option in self.options.values():
            add(self, option, option in OWN.get(command, ()))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Errors inside a class, or of a whole group, need the parser of that class or group.
        if self.reading and ("trainer.strategy" in message or "Unable to load config" in message):
            raise _Unsure from None
        super().error(message, ex)

    def names(self) -> list[str]:
        known = [*super().names(), "print_config", *sorted(self.parents)]
        return known + [f"{name}.help" for name, option in self.options.items() if option.classes]

    def take_out(self, settings: dict[str, Any]) -> None:
        """Removes classes other than the strategy from a config file's settings, in place."""
        if any(not isinstance(settings.get(group, {}), dict) for group in self.parents):
            raise _Unsure
        trainer = settings.get("trainer", {})
        for key, value in list(trainer.items()):
            option = self.options.get(f"trainer.{key.removesuffix('+')}")
            if option and option.classes and (key.endswith("+") or not _is_plain(option, yaml.safe_dump(value)[:-1])):
                self.whole = False
                del trainer[key]
        strategy = trainer.get("strategy", {})
        if not isinstance(strategy, dict) or strategy.keys() - {"class_path", "init_args"} or not _ours(strategy):
            self.whole = False
            trainer.pop("strategy")

    def plain(self, args: Sequence[str]) -> Iterator[str]:
        """The arguments without classes and whole groups, and the strategy's under their full names."""
        args, at = list(args), 0
        while at < len(args):
            arg, at = args[at], at + 1
            name, equals, value = arg.partition("=")
            values = []
            if not equals and name.startswith("--") and at < len(args) and not args[at].startswith("--"):
                values, at = [args[at]], at + 1
                value = values[0]
            key = name.removeprefix("--")
            short = key.removeprefix("trainer.strategy.")
            if short != key and f"{STRATEGY}{short}" in self.options:
                name = f"--{STRATEGY}{short}"
            elif self._left_out(key, value):
                self.whole = False
                continue
            yield f"{name}={value}" if equals else name
            yield from values

    def _left_out(self, key: str, value: str) -> bool:
        base = key.removesuffix("+")
        if key.startswith("print_config") or base in self.parents:
            return True
        if base.startswith("trainer.strategy."):
            return base not in self.options
        of_classes = (name for name, option in self.options.items() if option.classes)
        owner = next((name for name in of_classes if base == name or base.startswith(f"{name}.")), None)
        return owner is not None and not (key == owner and _is_plain(self.options[owner], value))


def _is_plain(option: Option, value: str) -> bool:
    """Whether a value, from an argument or YAML, names no class."""
    word = value.removesuffix("\n...")
    return word in ("true", "false", "null") or (str in (option.type, *get_args(option.type)) and word.islower())


def _ours(strategy: dict[str, Any]) -> bool:
    return strategy.get("class_path", STRATEGY_CLASS) in STRATEGY_NAMES


def read(command: str, args: Sequence[str]) -> tuple[EarlyParser, Namespace | None]:
    """Reads a command's arguments; the config is None if some need the command's own parser.

    Raises:
        SystemExit: --help is answered, or an option is refused in one line.
    """
    wanted = next((at for at, arg in enumerate(args) if arg in HELP), None)
    if wanted is not None:
        word = args[wanted + 1] if wanted + 1 < len(args) and not args[wanted + 1].startswith("-") else None
        print(help_text(command, word))
        raise SystemExit(0)
    parser = EarlyParser(command)
    try:
        config = parser.parse_args(list(parser.plain(args)))
        parser.reading = False
        if command not in OF_FUNCTIONS:
            check_ranges(config)
    except UserError as error:
        parser.reading = False
        parser.error(str(error))
    except _Unsure:
        return parser, None
    return parser, config if parser.whole else None
