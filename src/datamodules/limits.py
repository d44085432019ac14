"""Whether the trainer's limits and intervals agree with the batches that the data comes to.

Without torch and Lightning: whoever plans refuses what whoever trains does.
"""

from typing import Any, NamedTuple

from src.errors import UserError
from src.units import counted

MICRO_BATCHES = ("micro-batch", "micro-batches")


class Limits(NamedTuple):
    """The trainer's options of these names. A limit is a number of batches, a fraction of them, or None for all."""

    limit_train_batches: float | None = None
    limit_val_batches: float | None = None
    val_check_interval: Any = None  # an int: in micro-batches
    check_val_every_n_epoch: int | None = 1

    @classmethod
    def of(cls, trainer: Any) -> "Limits":
        """Those of a Trainer, or of the `trainer` in a parsed config."""
        if trainer.fast_dev_run:  # replaces them all
            return cls(int(trainer.fast_dev_run), int(trainer.fast_dev_run))
        return cls(*(getattr(trainer, name, None) for name in cls._fields))


def taken(batches: int, limit: float | None) -> int:
    """Of so many batches those that Lightning takes."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def check_training(rows: int, replicas: int, batch_size: int, accumulation: int, limits: Limits) -> None:
    """Refuses options of the trainer that leave an epoch without an optimizer step or a validation.

    Args:
        rows: packed rows of an epoch.
        replicas: data-parallel size.
        accumulation: micro-batches per optimizer step; so large that the rows fill less than a tenth of one is refused.

    Raises:
        UserError: the option, its value, and what it could be.
    """
    filled = -(-rows // (replicas * batch_size))
    if accumulation > 1 and accumulation >= 10 * filled:
        raise UserError(
            f"trainer.accumulate_grad_batches is {accumulation}, but the {counted(rows, 'row')} of an epoch fill "
            f"{counted(filled, *MICRO_BATCHES)} "
            f"(data parallel {replicas} x batch {batch_size}): lower it, to {filled} say, or give "
            "more data."
        )
    batches = -(-filled // accumulation) * accumulation
    _check_limit("limit_train_batches", limits.limit_train_batches, batches, "an epoch")
    trained = taken(batches, limits.limit_train_batches)
    if trained % accumulation:
        raise UserError(
            f"trainer.limit_train_batches {limits.limit_train_batches} ends an epoch of "
            f"{counted(batches, *MICRO_BATCHES)} after {trained}, in the middle of an optimizer step; it must give a "
            f"multiple of accumulate_grad_batches {accumulation}"
        )
    interval = limits.val_check_interval
    validates = limits.check_val_every_n_epoch is not None and limits.limit_val_batches != 0
    if validates and isinstance(interval, int) and interval > trained:
        raise UserError(
            f"trainer.val_check_interval is {interval}, but an epoch has {counted(trained, *MICRO_BATCHES)}: lower it, "
            f"to {trained} say, or count over all epochs with --trainer.check_val_every_n_epoch=null."
        )


def check_validation(name: str, rows: int, replicas: int, batch_size: int, limit: float | None) -> None:
    """Refuses a `limit_val_batches` that leaves none of the rows of the set `name`. Raises as `check_training`."""
    if limit != 0:
        _check_limit("limit_val_batches", limit, -(-rows // (replicas * batch_size)), name)


def _check_limit(option: str, limit: float | None, batches: int, whole: str) -> None:
    if not taken(batches, limit):
        raise UserError(
            f"trainer.{option} is {limit}, less than one of the {counted(batches, *MICRO_BATCHES)} of {whole}: raise "
            "it, or give a whole number of micro-batches, 1 or more."
        )
