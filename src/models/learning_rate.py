"""The learning rate's course over the optimizer steps."""

import math


def warmup_cosine(step: int, *, total: int, warmup: int, floor: float) -> float:
    """The factor on the learning rate at 0-based optimizer step `step` of `total`.

    Linear over the first `warmup` steps, (step + 1) / warmup, then a cosine from 1 that would reach `floor` at the step
    after the last: at a floor of 0 the last one would train nothing.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
