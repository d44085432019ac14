"""Which parameters `freeze` names. Patterns are over published names, so that shards of experts do not show in them."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from src.errors import UserError

_SHARD = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate_up_proj|down_proj)")


def published_names(name: str, experts_per_shard: int) -> list[str]:
    """A parameter's name in Hugging Face's checkpoints, or the names of the experts' weights that it stacks."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return [name]
    prefix, shard, kind = match[1], int(match[2]), match[3]
    projections = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    experts = range(shard * experts_per_shard, (shard + 1) * experts_per_shard)
    return [f"{prefix}{expert}.{projection}.weight" for expert in experts for projection in projections]


def frozen(names: Iterable[str], patterns: Sequence[str], experts_per_shard: int) -> set[str]:
    """Those of the parameters `names` that the patterns (`*`, `?`) match in their published names.

    Raises:
        ValueError: a pattern matches nothing, or they match a part of the experts, or of the weights, that ZeRO-3
            gathers and trains as one.
    """
    published = {name: published_names(name, experts_per_shard) for name in names}
    every = [one for ones in published.values() for one in ones]
    unmatched = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(one, pattern) for one in every)]
    if unmatched:
        raise UserError(
            f"freeze: no parameter's name matches {', '.join(map(repr, unmatched))}; names are such as {every[0]} "
            f"and {every[-1]}, as in the model's published files."
        )
    chosen = set()
    for name, ones in published.items() if patterns else ():
        hit = [any(fnmatch.fnmatchcase(one, pattern) for pattern in patterns) for one in ones]
        if any(hit) and not all(hit):
            raise UserError(
                f"freeze {', '.join(map(repr, patterns))} matches {ones[hit.index(True)]} and not "
                f"{ones[hit.index(False)]}, which are trained as one tensor ({experts_per_shard} experts per shard): "
                f"name them all, or set --model.experts_per_shard to a divisor that separates them."
            )
        if all(hit):
            chosen.add(name)
    return chosen
