"""`COMMAND --help [WORD]`: the most used options on one screen; on request all, or those about WORD."""

import re
import textwrap
from collections.abc import Sequence
from itertools import groupby
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from src.commands.options import OWN, Option, options_of
from src.strategies.zero_limits import STRATEGY

WHAT = {
    "fit": "Trains, from a config file.",
    "validate": "Prints the loss on the validation data.",
    "plan": "Says whether a run fits, how long it takes and what it waits for; from the config alone.",
    "check-data": "Lists what is wrong with a config's data, and what it comes to.",
    "rehearse": "Runs one rank of the whole job on one GPU, without a network.",
    "preflight": "Looks at every node before a run; under srun or torchrun.",
    "export": "Writes a checkpoint as a Hugging Face directory.",
    "verify": "Compares a Hugging Face directory with transformers, or with the published layout.",
}
# Most used first.
ESSENTIAL = (
    *("model.pretrained", "model.learning_rate", "data.train_files", "data.val_files", "data.max_length"),
    *("trainer.default_root_dir", "trainer.max_epochs", "trainer.max_steps", "trainer.accumulate_grad_batches"),
    *("trainer.num_nodes", "trainer.devices", "trainer.accelerator", f"{STRATEGY}sequence_parallel_size"),
    *(f"{STRATEGY}offload_optimizer", "checkpoint.every_n_train_steps", "checkpoint.keep", "export.out"),
)
CONFIG = "a YAML file of these options; may be given more than once, a later one over the earlier"
WIDTH = 100


def help_text(command: str, word: str | None = None) -> str:
    """The text of --help. `word`: "all", or part of an option's name; None lists the most used."""
    options = list(options_of(command))
    mine = [option for option in options if option.name in {own.name for own in OWN.get(command, ())}]
    of_config = command not in ("export", "verify")
    lines = [f"usage: python -m src.cli {command} {'--config FILE ' if of_config else ''}[--NAME VALUE ...]", ""]
    if word is None:
        lines += [WHAT[command], ""]
        if not of_config:
            return "\n".join([*lines, *_blocks(options)])
        named = {option.name: option for option in options}
        lines += [_line("--config FILE", CONFIG)]
        lines += [_short(option) for option in mine]
        lines += [_short(named["ckpt_path"])] if command in ("fit", "validate") else []
        lines += [_short(named[name]) for name in ESSENTIAL]
        lines += [_line("--print_config", "print all settings, merged, and stop")]
        lines += ["", f"{len(options)} options: `--help all` lists them, `--help WORD` those with WORD in their name;"]
        lines += ["configs/full.yaml shows them as a config. --trainer.callbacks.help CLASS lists a class's own."]
        return "\n".join(lines)
    matching = [option for option in options if word == "all" or word in option.name]
    if not matching:
        return "\n".join([*lines, f"no option of {command} has {word!r} in its name; --help all lists them."])
    return "\n".join([*lines, *_blocks(matching)])


def _blocks(options: Sequence[Option]) -> list[str]:
    lines = []
    for group, some in groupby(options, lambda option: option.name.partition(".")[0] if "." in option.name else ""):
        lines += [f"{group}:"] if group else []
        for option in some:
            lines.append(f"  --{option.name}")
            lines += [f"      {line}" for line in grouped(option, WIDTH - 6)]
        lines.append("")
    return lines[:-1]


def _short(option: Option) -> str:
    first = re.split(r"(?<=[a-z)])[.;] ", option.meaning)[0].rstrip(".")
    default = "" if option.default is None or isinstance(option.default, bool) else f" [{option.default}]"
    return _line(f"--{option.name.replace('.init_args', '')}", first + default)


def _line(name: str, meaning: str) -> str:
    return f"  {name:40} {textwrap.shorten(meaning, WIDTH - 24, placeholder=' ...')}"


def grouped(option: Option, width: int) -> list[str]:
    """An option's meaning, type and default, in lines of at most `width` characters."""
    kind = type_text(option.type) + (", or a class by its class_path" if option.classes else "")
    default = "must be given" if option.required else f"default {default_text(option.default)}"
    return textwrap.wrap(f"{option.meaning} ({kind}; {default})".strip(), width, break_on_hyphens=False)


def default_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)


def type_text(annotation: Any) -> str:
    """A type annotation as a config writes it."""
    origin, args = get_origin(annotation), get_args(annotation)
    words = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "null", Any: "any"}
    if annotation in words:
        return words[annotation]
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(type_text(arg) for arg in args if getattr(arg, "__name__", "") != "Path"))
    if origin is not None:
        inner = [type_text(arg) for arg in args if arg is not Ellipsis]
        return f"mapping to {inner[-1]}" if origin is dict else f"list of {inner[0]}"
    return "hours:minutes:seconds" if getattr(annotation, "__name__", "") == "timedelta" else str(annotation)
