"""Writes src/commands/option_list.py and configs/full.yaml from the parsers' signatures and docstrings.

python scripts/make_options.py     after a change of an option; a test holds both against the parsers
"""

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace

from src.commands.config_command import ConfigCommand
from src.commands.export import export
from src.commands.help_text import grouped
from src.commands.options import OWN, STRATEGY_CLASS, Option
from src.commands.training import TrainingCLI
from src.commands.verify import verify
from src.strategies import DeepSpeedSPStrategy
from src.strategies.zero_limits import STRATEGY

ROOT = Path(__file__).parents[1]
LIST, FULL = ROOT / "src/commands/option_list.py", ROOT / "configs/full.yaml"
NEEDED = {"model.pretrained": "configs/models/deepseek-v3", "data.train_files": ["data/train.jsonl"]}

# Of Lightning's, what means something else here.
OTHERWISE = {
    "ckpt_path": "the checkpoint to continue from: its folder, `last` for the run's newest, or `auto` for the newest "
    "if there is one",
    "seed_everything": "the seed of all random numbers; true draws one",
    "trainer.default_root_dir": "the run's folder: checkpoints, curves, stacks; by default the working directory",
    "trainer.devices": "processes of a node, one per GPU: their number, a list of GPUs, or auto",
    "trainer.max_epochs": "epochs, -1 for no end",
    "trainer.max_steps": "optimizer steps, -1 for those of all epochs",
    "trainer.accumulate_grad_batches": "micro-batches per optimizer step",
    "trainer.accelerator": "cuda, cpu or auto",
    "trainer.precision": "bf16-true, or 32-true",
    "trainer.gradient_clip_val": "the largest norm of a gradient; null or 0 clips none",
    "trainer.num_nodes": "nodes of the job",
}


class _Parser(ConfigCommand):
    """Of the options that all commands share."""

    name = "options"

    def run_command(self) -> None:
        pass


class _Validate(TrainingCLI):
    def before_instantiate_classes(self) -> None:
        """Nothing is looked at."""

    def instantiate_classes(self) -> None:
        """Nothing is made."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def options() -> dict[str, list[Option]]:
    """The options of `fit`, those of `validate` beside them, of `export` and of `verify`."""
    needed = [f"--{name}={value}" for name, value in NEEDED.items()]
    shared = _Parser(needed).parser
    subparsers = _Validate(["validate", *needed])._subcommand_parsers
    fit = list(_of(shared))
    names = {option.name for option in fit}
    return {
        "FIT": fit,
        "VALIDATE": [option for option in _of(subparsers["validate"]) if option.name not in names],
        "EXPORT": list(_of_function(export)),
        "VERIFY": list(_of_function(verify)),
    }


def _of_function(function: Any) -> Iterator[Option]:
    parser = ArgumentParser()
    parser.add_function_arguments(function, as_positional=False)
    return _of(parser)


def _of(parser: ArgumentParser) -> Iterator[Option]:
    for action in parser._actions:
        if action.dest == "trainer.strategy":
            yield Option(f"{action.dest}.class_path", str, STRATEGY_CLASS, "the strategy's class", classes=True)
            strategy = ArgumentParser()
            strategy.add_class_arguments(DeepSpeedSPStrategy, STRATEGY.removesuffix("."))
            yield from _of(strategy)
        elif type(action).__name__ == "ActionTypeHint":
            annotation = vars(action)["_typehint"]
            kept = _without_classes(annotation)
            meaning = re.sub(r"\s*Default: ``[^`]*``\.", "", action.help or "")  # Lightning's, not ours
            meaning = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", meaning).replace("``", "`")
            meaning = OTHERWISE.get(action.dest, " ".join(meaning.split()))
            default = action.default
            assert not isinstance(default, Namespace), action.dest
            yield Option(action.dest, kept, default, meaning, bool(action.required), kept != annotation)


def _without_classes(annotation: Any) -> Any:
    """A union's plain members: what can be read without a library's classes."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    return Union[tuple(member for member in get_args(annotation) if _plain(member))]  # noqa: UP007


def _plain(annotation: Any) -> bool:
    known = (int, float, bool, str, type(None), Any, Ellipsis)
    origin = get_origin(annotation)
    if origin is Literal:
        return True
    if origin is not None:
        return all(map(_plain, get_args(annotation))) and origin in (list, dict, tuple, Union, types.UnionType)
    return annotation in known or getattr(annotation, "__module__", "") in ("datetime", "pathlib")


def source(annotation: Any) -> str:
    """An annotation as Python writes it."""
    if annotation is type(None):
        return "None"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, args))}]"
    if origin in (Union, types.UnionType):
        return " | ".join(map(source, args))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(source, args))}]"
    return str(getattr(annotation, "__name__", annotation))


def list_text(found: dict[str, list[Option]]) -> str:
    lines = [
        '"""Every option as the parsers have it. Made by scripts/make_options.py, not by hand."""',
        "",
        "# ruff: noqa: E501",
        "# fmt: off",
        "from datetime import timedelta",
        "from pathlib import Path",
        "from typing import Any, Literal",
        "",
        "from src.commands.options import Option",
    ]
    for name, some in found.items():
        lines += ["", f"{name} = ("]
        for option in some:
            shown = repr(option.default).removeprefix("datetime.")
            flags = ", ".join(f"{flag}=True" for flag in ("required", "classes") if getattr(option, flag))
            parts = [repr(option.name), source(option.type), shown, repr(option.meaning), *([flags] if flags else [])]
            lines.append(f"    Option({', '.join(parts)}),")
        lines.append(")")
    return "\n".join(lines) + "\n"


def full_text(fit: list[Option]) -> str:
    """A config of all defaults, each with its meaning and type; what DeepSpeedStrategy inherits is left out."""
    own = set(DeepSpeedSPStrategy.__init__.__annotations__)
    lines = [
        "# Every option with its meaning, type and default: a page to look things up in, and no run. A config of yours",
        "# holds what differs. Made by scripts/make_options.py. trainer.strategy takes what Lightning's",
        "# DeepSpeedStrategy takes, too: `fit --help strategy` lists it.",
    ]
    above: tuple[str, ...] = ()
    for option in fit:
        *path, leaf = option.name.split(".")
        if option.name.startswith(STRATEGY) and leaf not in own:
            continue
        for depth, part in enumerate(path):
            if above[: depth + 1] != tuple(path[: depth + 1]):
                lines.append(f"{'  ' * depth}{part}:")
        above, indent = tuple(path), "  " * len(path)
        default = NEEDED.get(option.name, option.default)
        value = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
        lines += [f"{indent}# {line}" for line in grouped(option, 118 - len(indent))]
        lines.append(f"{indent}{leaf}: {value.splitlines()[0]}")
    return "\n".join(lines) + "\n"


def main() -> None:
    found = options()
    LIST.write_text(list_text(found), encoding="utf-8")
    FULL.write_text(full_text(found["FIT"]), encoding="utf-8")
    print(f"{sum(map(len, found.values()))} options, {sum(map(len, OWN.values()))} more of single commands")


if __name__ == "__main__":
    main()
