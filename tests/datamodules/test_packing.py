import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.datamodules.packing import one_sample_a_row, pack


@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_every_sample_is_in_exactly_one_row_that_holds_it(lengths: list[int]) -> None:
    values = np.array(lengths, dtype=np.int32)
    rows = pack(values, 50)
    assert sorted(rows.samples.tolist()) == list(range(len(lengths)))
    totals = rows.sum(values)
    assert totals.tolist() == [int(values[rows[row]].sum()) for row in range(len(rows))]
    assert all(0 < total <= 50 for total in totals)
    # Best fit never opens a row while another has room, so no two rows would fit into one.
    assert len(totals) < 2 or np.sort(totals)[:2].sum() > 50


def test_rows_are_full_and_the_same_each_time() -> None:
    """Lengths as of short reasoning conversations: log-normal about 150 tokens, in rows of 4,096."""
    lengths = np.random.default_rng(0).lognormal(5.0, 0.5, 200_000).astype(np.int32).clip(10, 4096)
    rows = pack(lengths, 4096)
    assert lengths.sum() / (len(rows) * 4096) > 0.99
    again = pack(lengths, 4096)
    assert np.array_equal(rows.samples, again.samples) and np.array_equal(rows.offsets, again.offsets)


def test_without_packing_each_sample_is_a_row() -> None:
    rows = one_sample_a_row(3)
    assert [rows[row].tolist() for row in range(len(rows))] == [[0], [1], [2]]


@pytest.mark.parametrize("lengths", [[0, 3], [11]])
def test_lengths_outside_a_row_are_a_bug(lengths: list[int]) -> None:
    with pytest.raises(AssertionError):
        pack(np.array(lengths), 10)
