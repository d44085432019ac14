"""Resuming: checks that the data continues, and rewrites Lightning's loop progress from the optimizer step, the one
number that no layout changes."""

from typing import Any

from src.errors import UserError
from src.units import counted


def align_progress(
    loops: dict[str, Any],
    global_step: int,
    *,
    steps_per_epoch: int,
    accumulate_grad_batches: int,
    has_max_steps: bool,
) -> None:
    """Makes a checkpoint's loop states resume at optimizer step `global_step`, in place.

    Lightning counts micro-batches, which change with the layout; it counts an epoch cut short by `max_steps` as whole;
    and after a checkpoint at the end of an epoch it skips the next one's `on_train_epoch_start` and miscounts it. This
    writes what Lightning itself would have saved at that step: within an epoch in `on_train_batch_end` of its last
    micro-batch, else after the whole epoch.

    Args:
        loops: `checkpoint["loops"]`.
        steps_per_epoch: optimizer steps of an epoch.
        has_max_steps: the trainer has max_steps; Lightning then keeps "restarting" over a finished epoch.
    """
    if global_step == 0:
        return
    fit = loops["fit_loop"]
    epochs, step = divmod(global_step, steps_per_epoch)
    begun = epochs + (step > 0)
    restarts = step > 0 or has_max_steps  # whether Lightning continues the batch progress or starts a new epoch
    # In on_train_batch_end the last batch is processed, but not yet completed or counted as stepped.
    pending = int(restarts)
    batches = (step or steps_per_epoch) * accumulate_grad_batches
    progress = fit["epoch_loop.batch_progress"]
    progress["current"] = _counts(batches, batches, batches - pending)
    total = global_step * accumulate_grad_batches
    progress["total"] = _counts(total, total, total - pending)
    progress["is_last_batch"] = False
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = global_step - pending
    for scope in ("current", "total"):
        fit["epoch_progress"][scope] = _counts(begun, epochs, epochs)


def _counts(begun: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": begun, "started": begun, "processed": processed, "completed": completed}


def check_identity(saved: dict[str, Any], now: dict[str, Any], batch_size: int, accumulate_grad_batches: int) -> None:
    """Refuses a checkpoint whose data would not continue here; `saved`, `now`: see `SFTDataModule.state_dict`.

    Raises:
        ValueError: the data, its order, or the rows per step differ from the checkpoint's.
    """
    for name in ("max_length", "packing", "seed", "train_weights"):
        if saved.get(name) != now[name]:  # older checkpoints have no train_weights
            raise UserError(
                f"data.{name} is {now[name]}, but the checkpoint was trained with {saved.get(name)}, and the rows that "
                f"it has yet to see would be others: set --data.{name} {str(saved.get(name)).replace('None', 'null')}"
            )
    if saved["fingerprint"] != now["fingerprint"] or saved["rows"] != now["rows"]:
        raise UserError(
            f"the training data is not the checkpoint's: {counted(now['rows'], 'row')} ({now['fingerprint']}), "
            "but it was "
            f"trained on {saved['rows']} ({saved['fingerprint']}); the files' bytes and order, the tokenizer with "
            "its template, overlong and history_reasoning must be the same, with train_weights the entries of "
            "train_files too. For other data start a new run from exported weights"
        )
    if saved["rows_per_step"] != now["rows_per_step"]:
        raise UserError(
            _other_rows_per_step(saved["rows_per_step"], now["rows_per_step"], batch_size, accumulate_grad_batches)
        )
    if saved["steps_per_epoch"] != now["steps_per_epoch"]:
        raise UserError(
            f"an epoch has {now['steps_per_epoch']} optimizer steps, but the checkpoint's had "
            f"{saved['steps_per_epoch']}: set limit_train_batches as it was"
        )


def _other_rows_per_step(saved: int, now: int, batch_size: int, accumulation: int) -> str:
    one_micro_step = now // accumulation
    replicas = one_micro_step // batch_size
    remedy = (
        f"set --trainer.accumulate_grad_batches {saved // one_micro_step}"
        if saved % one_micro_step == 0
        else f"no accumulation gives {saved}: data-parallel size x batch_size must divide it"
    )
    return (
        f"an optimizer step takes {counted(now, 'row')} (data-parallel size {replicas} x batch_size {batch_size} x "
        f"accumulate_grad_batches {accumulation}), but the checkpoint's took {saved}; {remedy}"
    )
