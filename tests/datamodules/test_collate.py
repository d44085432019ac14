import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.datamodules.collate import IGNORE_INDEX, TOKEN_FIELDS, Document, collate, shard, target_counts


def document(ids: list[int], *spans: tuple[int, int], source: str = "f:1") -> Document:
    return Document(np.array(ids, dtype=np.int32), np.array(spans, dtype=np.int32).reshape(-1, 2), source)


def test_a_batch_by_hand() -> None:
    batch = collate([document([5, 6, 7, 8], (2, 4), source="f:1"), document([9, 3, 4], (1, 2), source="f:2")], 4)
    no = IGNORE_INDEX
    expected = {
        "input_ids": [5, 6, 7, 8, 9, 3, 4, 0],
        "labels": [no, 7, 8, no, 3, no, no, no],
        "document_ids": [0, 0, 0, 0, 1, 1, 1, -1],
        "mtp_input_ids": [6, 7, 8, 0, 3, 4, 0, 0],
        "mtp_labels": [7, 8, no, no, no, no, no, no],
    }
    assert {name: batch[name].tolist() for name in TOKEN_FIELDS} == expected
    assert all(batch[name].dtype == torch.int64 for name in TOKEN_FIELDS)
    assert batch["cu_seqlens"].tolist() == [0, 4, 7, 8] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"] == 4 and batch["sources"] == ["f:1", "f:2"]


@pytest.mark.parametrize("sp_size", [1, 4])
def test_a_batch_of_empty_rows_is_padding(sp_size: int) -> None:
    batch = collate([], sp_size)
    assert batch["input_ids"].shape == (sp_size,) and batch["document_ids"].tolist() == [-1] * sp_size
    assert batch["cu_seqlens"].tolist() == [0, sp_size] and batch["max_seqlen"] == sp_size and batch["sources"] == []
    assert (batch["labels"] == IGNORE_INDEX).all() and (batch["mtp_labels"] == IGNORE_INDEX).all()


@st.composite
def documents(draw: st.DrawFn) -> Document:
    length = draw(st.integers(1, 9))
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=4, unique=True)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    return document(draw(st.lists(st.integers(1, 99), min_size=length, max_size=length)), *spans)


@given(rows=st.lists(documents(), max_size=4), sp_size=st.sampled_from([1, 2, 4]))
def test_shards_are_the_whole_and_counts_are_what_the_sampler_adds_up(rows: list[Document], sp_size: int) -> None:
    batch = collate(rows, sp_size)
    shards = [shard(batch, rank, sp_size) for rank in range(sp_size)]
    for name in TOKEN_FIELDS:
        assert torch.equal(torch.cat([part[name] for part in shards]), batch[name])
        assert len({len(part[name]) for part in shards}) == 1
    assert all(torch.equal(part["cu_seqlens"], batch["cu_seqlens"]) for part in shards)
    counts = [target_counts(row.target_spans) for row in rows]
    assert int((batch["labels"] != IGNORE_INDEX).sum()) == sum(labels for labels, _ in counts)
    assert int((batch["mtp_labels"] != IGNORE_INDEX).sum()) == sum(mtp for _, mtp in counts)
    # Sharding loses no target at a boundary, and no label crosses a document's.
    unsharded = collate(rows, 1)
    used = int(unsharded["cu_seqlens"][len(rows)]) if rows else 0
    assert torch.equal(unsharded["labels"][:used], batch["labels"][:used])
    ends = batch["cu_seqlens"][1:] - 1
    assert (batch["labels"][ends] == IGNORE_INDEX).all() and (batch["mtp_input_ids"][ends] == 0).all()
