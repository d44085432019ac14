"""Lightning's loop progress, rewritten from the one number that no layout changes: the optimizer step."""

from typing import Any


def align_progress(
    loops: dict[str, Any],
    global_step: int,
    *,
    steps_per_epoch: int,
    accumulate_grad_batches: int,
    has_max_steps: bool,
) -> None:
    """Makes a checkpoint's loop states resume at optimizer step `global_step`, in place.

    Lightning counts micro-batches, which change with the layout; it counts an epoch that `max_steps` cut short as
    whole; and after a checkpoint at the very end of an epoch it skips the next one's `on_train_epoch_start` and loses
    count of it. What is written is what Lightning itself would have saved at that step: in the middle of an epoch in
    `on_train_batch_end` of its last micro-batch, else after the whole epoch.

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
    restarts = step > 0 or has_max_steps  # whether Lightning takes up the batch progress, or starts an epoch afresh
    # Saved in on_train_batch_end, the last batch is processed but not yet completed, nor counted as having stepped.
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
