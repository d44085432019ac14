"""A parser whose errors are one line: where the value is, what it must be, or which option was meant."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

LONGEST = 300  # characters of a value that are shown

TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "list": "a list",
    "tuple": "a list",
    "collections.abc.Iterable": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
UNKNOWN = re.compile(r"(?:Group '([^']+)' does not accept|Subcommand '[^']+' does not accept) option '([^']+)'")
UNKNOWN_TOO = re.compile(r"Option '([^']+)' is not accepted")
OURS = re.compile(r"(\S+) is not an option")


class OneLineParser(ArgumentParser):
    """Exits with 2 and a single line, which 40 lines of usage would hide."""

    choices: ClassVar[Mapping[str, Sequence[Any]]] = {}  # for options whose types allow more than the command does
    outer: ClassVar[Self | None] = None  # the command line's, since classes' know neither arguments nor files

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read: list[tuple[str, dict[str, Any]]] = []  # config files and their own settings, in reading order

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        if any(isinstance(action, ActionConfigFile) for action in self._actions):
            OneLineParser.outer = self
        return super().parse_args(*args, **kwargs)

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        try:
            super().validate(namespace, *args, **kwargs)
        except KeyError as error:
            match = UNKNOWN.search(str(error)) or UNKNOWN_TOO.search(str(error))
            if match is None:
                raise
            # Only a class's own parser knows its names.
            raise type(error)(self._unknown(".".join(filter(None, match.groups())))) from None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        self.exit(2, f"error: {self._plain(message)}\n")

    def names(self) -> list[str]:
        """The option that a typo may have meant."""
        return [action.dest for action in self._actions if action.dest != "help"]

    def _unknown(self, key: str, dashes: str = "") -> str:
        name, names = key.removesuffix("+"), self.names()
        leaf = name.rpartition(".")[2]
        same = [known for known in names if known.rpartition(".")[2] == leaf][:2]
        near = same or get_close_matches(name, names, 1, 0.7) or get_close_matches(leaf, names, 1, 0.7)
        meant = f"did you mean {' or '.join(dashes + known for known in near)}?" if near else "--help lists them all."
        if not near and self is not OneLineParser.outer:
            meant = f"its class takes {', '.join(names)}."
        return f"{dashes}{key} is not an option; {meant}"

    def _plain(self, message: str) -> str:
        if match := OURS.search(message):
            key, meant = match[1], " ".join(message[match.start() :].splitlines()[0].split())
            where, full = self._place(key)
            option = full.removesuffix(key)  # where it stands, before the name that its class does not know
            return f"{where}{option}{meant.replace('did you mean ', f'did you mean {option}')}"
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0]
            if not word.startswith("--"):
                return f"{word} is not an option; options are written --NAME=VALUE."
            return self._unknown(word.removeprefix("--").partition("=")[0], "--")
        if match := re.fullmatch(r"the following arguments are required: (.*)", message):
            names = [name.removeprefix(f"{self.prog.split()[-1]}.") for name in match[1].split(", ")]
            return f"{', '.join(names)} must be given, with --{names[0]}=VALUE or in a config file."
        if match := re.fullmatch(r"argument (\S+): expected (\w+) arguments?", message):
            return f"{match[1].split('/')[-1]} needs a value."
        if match := re.match(r'Parser key "([^"]+)":(.*)', message, re.DOTALL):
            return self._wrong(match[1], match[2])
        return " ".join(message.split())

    def _wrong(self, key: str, reason: str) -> str:
        given = re.findall(r"(?:Got value|Given value|Unable to load config): ?(.*)", reason) or re.findall(
            r"Unable to load config '(.*)'", reason
        )
        value = re.sub(r"^NestedArg\(.*val=(.*)\)$", r"\1", given[-1].strip()) if given else ""
        wanted = list(dict.fromkeys(filter(None, map(_wanted, reason.splitlines()))))
        if "Unable to load config" in reason:
            wanted, value = ["a mapping, or its options one by one"], re.findall(r"config ['\"](.*)['\"]", reason)[-1]
        if allowed := self.choices.get(key):
            wanted = [f"one of {', '.join(dict.fromkeys(map(str, allowed)))}"]
        where, full = self._place(key)
        if not wanted:
            return f"{where}{full}: {' '.join(reason.split())[:LONGEST]}"
        return f"{where}{full} is {value[:LONGEST] or 'empty'}; it must be {' or '.join(wanted)}."

    def _place(self, key: str) -> tuple[str, str]:
        """The file that gives an option, nothing for the command line, and its whole name."""
        outer = OneLineParser.outer or self
        for arg in getattr(outer, "args", []):
            name = re.match(r"--([\w.]+)", arg)
            if name and (name[1] == key or name[1].endswith(f".{key}")):
                return "", f"--{name[1]}"
        for path, settings in reversed(outer.read):
            for full in _names(settings):
                if full == key or full.endswith(f".{key}"):
                    return f"{path}: ", full
        return "", key


def _wanted(line: str) -> str:
    """Rewords jsonargparse's message about a type for users; empty if it is about something else."""
    if match := re.search(r"Expected a <class '([\w.]+)'>", line):
        return TYPES.get(match[1], f"a {match[1].rpartition('.')[2]} by its class_path")
    if match := re.search(r"Expected a typing\.Literal\[(.*?)\]", line):
        return f"one of {match[1].replace(chr(39), '')}"
    if match := re.search(r"Expected a tuple with (\d+) elements", line):
        return f"a list of {match[1]}"
    if "Not of type timedelta" in line:
        return "hours:minutes:seconds"
    if "Expected a dot import path" in line:
        return "a class by its class_path"
    return ""


def _names(settings: Any, prefix: str = "") -> Iterator[str]:
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(settings, dict):
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in settings.items()]
    elif isinstance(settings, list):
        items = [(prefix, value) for value in settings]
    for name, value in items:
        yield name
        yield from _names(value, name)


def shown(path: Path) -> str:
    """A path as the user may have written it: relative if it is below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
