"""Finds out whether a run can write to its folders, by writing there before anything is loaded."""

from pathlib import Path

from jsonargparse import Namespace

from src.callbacks.folders import checkpoint_folder, weights_folder
from src.datamodules.files import default_cache_dir
from src.disk.space import Room, try_to_write
from src.errors import UserError
from src.strategies.zero_limits import STRATEGY


def places(config: Namespace) -> dict[str, str]:
    """The folders that a run of this config writes to, by option."""
    root = str(config.trainer.default_root_dir or ".")
    folders = {
        "trainer.default_root_dir": root,
        "trainer.default_root_dir, checkpoints": str(checkpoint_folder(root)),
        "data.cache_dir": str(config.data.cache_dir or default_cache_dir()),
    }
    if config.weights.every_n_train_steps:
        folders["trainer.default_root_dir, weights"] = str(weights_folder(root))
    if config.export.out is not None:
        folders["export.out"] = str(config.export.out)
    if config.stop.marker is not None:
        folders["stop.marker"] = str(Path(config.stop.marker).absolute().parent)
    strategy = config.trainer.strategy.init_args
    if "nvme" in (strategy.remote_device, strategy.offload_optimizer_device, strategy.offload_params_device):
        folders[f"{STRATEGY}nvme_path"] = str(strategy.nvme_path)
    loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
    for logger in loggers:
        arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
        if arguments is not None and arguments.get("save_dir"):
            folders[f"trainer.logger {logger.class_path.rpartition('.')[2]}"] = str(arguments.save_dir)
    return folders


def unwritable(config: Namespace) -> list[str]:
    """The problems of `places`, each folder once."""
    problems: dict[str, str] = {}
    for option, place in places(config).items():
        try:
            check_writable(option, place)
        except UserError as error:
            problems.setdefault(Room.at(Path(place)).folder, str(error))
    return list(problems.values())


def check_writable(option: str, path: str | Path) -> None:
    """Writes and removes a file in the folder `path`, or in its nearest existing parent.

    Raises:
        UserError: it cannot be written; names the option, and what is free there.
    """
    room = Room.at(Path(path))
    try:
        try_to_write(Path(room.folder))
    except OSError as error:
        raise UserError(
            f"{option} {path}: {room.folder} cannot be written: {error.strerror}, {room}. "
            "Give another place, or make room there."
        ) from error
