"""Config files that name others: `config: base.yaml` reads base.yaml first, then the file itself over it.

Settings merge key by key at any depth, nested or dotted; a list replaces a list, `key+` appends to one, and another
`class_path` replaces the class and all its arguments.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, get_loader

from src.commands.one_line import shown
from src.commands.options import STRATEGY_CLASS, STRATEGY_NAMES
from src.errors import UserError

Tree = dict[str, Any]


class ConfigFile(ActionConfigFile):
    """The action of `--config FILE`; of several files a later one overrides an earlier one."""

    @staticmethod
    def apply_config(parser: ArgumentParser, cfg: Namespace, dest: str, value: str) -> None:
        inline = "://" in value or re.search(r":\s", value)  # a URL, or the settings themselves
        if not inline:
            settings = read_config(value, _classes(cfg), getattr(parser, "read", None))
            _forget_other_classes(cfg, settings)
            if hasattr(parser, "take_out"):
                parser.take_out(settings)
            value = yaml.safe_dump(settings)
        ActionConfigFile.apply_config(parser, cfg, dest, value)


def read_config(
    path: str | Path,
    into: Tree | None = None,
    read: list[tuple[str, Tree]] | None = None,
    readers: tuple[Path, ...] = (),
) -> Tree:
    """Merges the files that a file's `config` names, then its own settings, into `into`; returns it.

    Args:
        path: a YAML file; its `config` is a path, or a list of them, relative to its own folder.
        into: a nested mapping, such as of the classes that are chosen by default.
        read: gets each file with its own settings.
        readers: the files that are being read, each named by the one before.

    Raises:
        UserError: a file is not there, is no mapping, or names itself.
    """
    file = Path(path).expanduser().resolve()
    if file in readers:
        raise UserError(f"{path} names itself: {' -> '.join(f'config: {p.name}' for p in (*readers[1:], file))}.")
    try:
        content = get_loader("yaml")(file.read_text(encoding="utf-8"))
    except OSError as error:
        by = f"{readers[-1]} names it, and its paths are relative to its folder" if readers else "give another path"
        raise UserError(f"the config {path} cannot be read, {error.strerror or error}; {by}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"the config {path} holds {type(content).__name__}; it must be a mapping, `model: ...`.")
    named = content.pop("config", None)
    bases = named if isinstance(named, list) else [] if named is None else [named]
    settings = {} if into is None else into
    for base in bases:
        if not isinstance(base, str):
            raise UserError(f"{path}: config is {base!r}; it must be the path of a file, or a list of them.")
        read_config(file.parent / Path(base).expanduser(), settings, read, (*readers, file))
    own = nested(content)
    trainer = own.get("trainer")
    if isinstance(trainer, dict) and trainer.get("strategy") in STRATEGY_NAMES:
        trainer["strategy"] = {"class_path": STRATEGY_CLASS}
    if read is not None:
        read.append((shown(file), own))
    return merge(settings, own)


def nested(settings: Mapping[Any, Any]) -> Tree:
    """Turns dotted keys into nested mappings; the later of two equal keys counts."""
    tree: Tree = {}
    for key, value in settings.items():
        first, _, rest = str(key).partition(".")
        below = {rest: value} if rest else value
        merge(tree, {first: nested(below) if isinstance(below, Mapping) else below})
    return tree


def merge(into: Tree, over: Tree) -> Tree:
    """Merges `over` into `into` and returns it; both are nested."""
    for key, value in over.items():
        there = into.get(key)
        if isinstance(there, str) and isinstance(value, dict) and "class_path" not in value and "init_args" in value:
            there = {"class_path": there}
        name = key.removesuffix("+")
        if key.endswith("+") and (name in into or key in into):
            into[name if name in into else key] = _listed(into.get(name, there)) + _listed(value)
        elif isinstance(there, dict) and isinstance(value, dict) and not _another_class(there, value):
            into[key] = merge(dict(there), value)
        else:
            into.pop(f"{key}+", None)
            into[key] = value
    return into


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _another_class(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two settings name different classes; their modules and packages do not count."""
    names = [str(spec.get("class_path", "")).rpartition(".")[2] for spec in (before, after)]
    return all(names) and names[0] != names[1]


def _classes(cfg: Namespace) -> Tree:
    """The class_path of each class among the settings."""
    by_key = {key: _classes(value) for key, value in vars(cfg).items() if isinstance(value, Namespace)}
    named = {"class_path": cfg.class_path} if "class_path" in cfg else {}
    return named | {key: classes for key, classes in by_key.items() if classes}


def _forget_other_classes(cfg: Namespace, settings: Tree, prefix: str = "") -> None:
    """Drops a replaced class's arguments; jsonargparse would pass those that both classes have to the new one."""
    for key, value in settings.items():
        before = cfg.get(prefix + key)
        if isinstance(before, Namespace) and isinstance(value, dict):
            if _another_class(before.as_dict(), value):
                cfg[prefix + key] = None
            else:
                _forget_other_classes(cfg, value, f"{prefix}{key}.")
