"""Documents to a batch, and a batch to one sequence-parallel rank's slice. Pure functions.

Shapes: T tokens of the whole batch, a multiple of SP; D documents, padding included.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -100
PADDING_DOCUMENT = -1

Batch = dict[str, Any]
TOKEN_FIELDS = ("input_ids", "labels", "document_ids", "mtp_input_ids", "mtp_labels")


@dataclass(frozen=True)
class Document:
    """One sample: tokens [n], half-open target ranges [k, 2], and the row it comes from, "file:row"."""

    input_ids: npt.NDArray[np.int32]
    target_spans: npt.NDArray[np.int32]
    source: str


def target_counts(target_spans: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The numbers of labels and MTP labels that `collate` makes of a sample with these half-open target ranges.

    A document's first token is no label, since no token precedes it; its first two are no MTP labels.
    """
    spans = list(target_spans)
    labels, mtp_labels = (sum(max(stop - max(start, ahead), 0) for start, stop in spans) for ahead in (1, 2))
    return labels, mtp_labels


def collate(documents: Sequence[Document], sp_size: int) -> Batch:
    """Concatenates documents to one batch, shifts labels within each, and pads to a multiple of `sp_size`.

    Padding is a separate last document (document_ids -1, no labels), so attention never mixes it with others; a batch
    without documents is `sp_size` tokens of padding.

    Returns:
        int64 [T]: input_ids; labels (token i+1 where it is a target, else -100); document_ids; mtp_input_ids (token i+1
        of the same document, else 0); mtp_labels (token i+2 where it is a target, else -100). int32 [D+1]: cu_seqlens,
        which gives positions. max_seqlen: int. sources: list[str], one per document.
    """
    import torch  # here, since `plan` reads documents without torch

    lengths = [len(document.input_ids) for document in documents]
    used = sum(lengths)
    total = max(-(-used // sp_size), 1) * sp_size
    fields = {name: np.zeros(total, dtype=np.int64) for name in TOKEN_FIELDS}
    for name in ("labels", "mtp_labels"):
        fields[name][:] = IGNORE_INDEX
    fields["document_ids"][:] = PADDING_DOCUMENT
    start = 0
    for index, document in enumerate(documents):
        ids = document.input_ids
        targets = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
        for first, last in document.target_spans:
            targets[first:last] = ids[first:last]
        stop = start + len(ids)
        fields["input_ids"][start:stop] = ids
        fields["mtp_input_ids"][start : stop - 1] = ids[1:]
        fields["labels"][start : stop - 1] = targets[1:]
        fields["mtp_labels"][start : max(stop - 2, start)] = targets[2:]
        fields["document_ids"][start:stop] = index
        start = stop
    if total > used:
        lengths.append(total - used)
    return {
        **{name: torch.from_numpy(values) for name, values in fields.items()},
        "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        "max_seqlen": max(lengths),
        "sources": [document.source for document in documents],
    }


def shard(batch: Batch, sp_rank: int, sp_size: int) -> Batch:
    """One rank's contiguous slice of a batch: token fields [T] -> [T/SP]; everything else stays the whole row's."""
    local = len(batch["input_ids"]) // sp_size
    assert local * sp_size == len(batch["input_ids"])
    mine = slice(sp_rank * local, (sp_rank + 1) * local)
    # A copy, since a view would send the whole row through the loader's shared memory.
    return {name: value[mine].clone() if name in TOKEN_FIELDS else value for name, value in batch.items()}
