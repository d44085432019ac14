"""What fails on one rank fails on all: a rank that waits in a collective for one that is gone learns nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from src.checkpoints.export import OtherRankFailed
from src.errors import UserError


@contextmanager
def fail_together() -> Iterator[None]:
    """Around what every rank does by itself, without a collective, before all meet again; to be entered by all.

    Raises:
        UserError: on all ranks, where one's was one or an error of the system's.
        OtherRankFailed: on the others, where a rank failed otherwise; it raises its own error.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    if not dist.is_initialized():
        if own is not None:
            raise own
        return
    failures: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if own is None else (isinstance(own, UserError | OSError), str(own)))
    if isinstance(own, UserError) or (own is not None and not isinstance(own, OSError)):
        raise own
    for rank, failed in enumerate(failures):
        if failed is not None:
            of_users, text = failed
            raise (UserError if of_users else OtherRankFailed)(f"rank {rank} failed: {text}") from own
