"""The options of every command, without the heavy libraries."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

STRATEGY_CLASS = "src.strategies.DeepSpeedSPStrategy"
STRATEGY_NAMES = (STRATEGY_CLASS, STRATEGY_CLASS.rpartition(".")[2])  # as text, as Lightning allows for its own


OF_FUNCTIONS = ("export", "verify")  # commands whose options are a function's


class Option(NamedTuple):
    """One option of a command line and of a config, as its parser has it."""

    name: str
    type: Any  # without classes, where `classes`
    default: Any
    meaning: str
    required: bool = False
    classes: bool = False  # takes objects too, by their class_path


# Options of single commands, in addition to `fit`'s.
OWN: dict[str, tuple[Option, ...]] = {
    "plan": (
        Option("json", bool, False, "as JSON instead of tables"),
        Option("explain", bool, False, "each line's formula with its numbers"),
        Option("search", bool, False, "the fastest settings around these that fit, as arguments to paste"),
        Option("search_nodes", list[int] | None, None, "nodes that --search tries, [16, 32]; by default the run's"),
        Option("scale", bool, False, "the cost per token on 8 to 4,096 GPUs"),
        Option("cluster", str | None, None, "the machines: a file of preflight --write"),
        Option("trace", str | None, None, "write the simulated micro-step for Perfetto"),
        Option("picture", str | None, None, "draw the simulated micro-step"),
        Option(
            "document_length",
            int | None,
            None,
            "tokens of a document; by default the data's mean over tokens, else one document per row",
        ),
    ),
    "check-data": (
        Option("show", int, 0, "print N conversations of each set, spread over it"),
        Option("html", str | None, None, "write the report to this file too"),
    ),
    "rehearse": (
        Option("steps", int, 2, "optimizer steps; the first compiles and is not timed"),
        Option("cluster", str | None, None, "the machines: as plan's"),
        Option("document_length", int | None, None, "as plan's"),
        Option(
            "rows",
            Literal["full", "spread", "data"],
            "full",
            "their lengths: full as the plan's, 8 to 1 eighths of max_length in turn, or those of the data files",
        ),
        Option(
            "timeline",
            str | None,
            None,
            "trace a middle micro-step to this .json.gz, for https://ui.perfetto.dev; from accumulation 3 on",
        ),
        Option("gpu_memory", float | None, None, "GiB of a smaller card, to which this one is held"),
    ),
    "preflight": (Option("write", str | None, None, "write what was measured to FILE, for plan --cluster"),),
}


def add_own(parser: Any, command: str) -> None:
    """Adds a command's own options to its parser."""
    for option in OWN.get(command, ()):
        add(parser, option, own=True)


def add(parser: Any, option: Option, own: bool = False) -> None:
    """Adds an option; a boolean one of a command's own is a switch."""
    if own and option.type is bool:
        parser.add_argument(f"--{option.name}", action="store_true", help=option.meaning)
    else:
        more = {"required": True} if option.required else {"default": option.default}
        parser.add_argument(f"--{option.name}", type=option.type, help=option.meaning, **more)


def options_of(command: str) -> Iterator[Option]:
    """All options of a command, in its parser's order."""
    from src.commands.option_list import EXPORT, FIT, VALIDATE, VERIFY

    of_functions = {"export": EXPORT, "verify": VERIFY}
    if command in of_functions:
        yield from of_functions[command]
        return
    yield from FIT
    yield from VALIDATE if command == "validate" else OWN.get(command, ())
