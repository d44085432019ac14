import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from src.datamodules.sampler import EMPTY_ROW, MicroBatch, MicroBatchSampler

ROWS = 37
TARGETS = np.arange(1, ROWS + 1, dtype=np.int64)


def sampler(
    dp: int = 1, batch_size: int = 1, accumulation: int = 1, rank: int = 0, **options: object
) -> MicroBatchSampler:
    return MicroBatchSampler(
        TARGETS * 3,
        TARGETS,
        TARGETS * 2,
        batch_size=batch_size,
        accumulate_grad_batches=accumulation,
        num_replicas=dp,
        rank=rank,
        **options,  # type: ignore[arg-type]
    )


def steps(dp: int, batch_size: int, accumulation: int, epoch: int = 0, **options: object) -> list[list[MicroBatch]]:
    """The micro-batches of all ranks, an optimizer step a list."""
    ranks = []
    for rank in range(dp):
        one = sampler(dp, batch_size, accumulation, rank, **options)
        one.set_epoch(epoch)
        ranks.append(list(one))
        assert len(ranks[-1]) == len(one)
    return [
        [ranks[rank][index] for index in range(start, start + accumulation) for rank in range(dp)]
        for start in range(0, len(ranks[0]), accumulation)
    ]


@pytest.mark.parametrize("layout", [(1, 1, 8), (2, 2, 2), (8, 1, 1), (4, 1, 2), (1, 8, 1)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_step_has_the_same_rows_and_targets_on_every_layout(layout: tuple[int, int, int], shuffle: bool) -> None:
    expected = steps(1, 8, 1, epoch=3, shuffle=shuffle)
    found = steps(*layout, epoch=3, shuffle=shuffle)
    assert len(found) == len(expected) == 5
    for step, reference in zip(found, expected, strict=True):
        assert [row for micro in step for row in micro.rows] == list(reference[0].rows)
        rows = [row for micro in step for row in micro.rows if row != EMPTY_ROW]
        targets = int(TARGETS[rows].sum())
        assert {(micro.step_tokens, micro.step_targets, micro.step_mtp_targets) for micro in step} == {
            (3 * targets, targets, 2 * targets)
        }


def test_no_row_is_repeated_or_dropped() -> None:
    rows = [row for step in steps(2, 2, 2) for micro in step for row in micro.rows]
    assert sorted(row for row in rows if row != EMPTY_ROW) == list(range(ROWS))
    assert rows.count(EMPTY_ROW) == 40 - ROWS


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = [
        [micro.rows for step in steps(1, 1, 1, epoch, seed=seed) for micro in step]
        for epoch, seed in ((0, 0), (1, 0), (0, 7))
    ]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert orders[0] == [micro.rows for step in steps(1, 1, 1) for micro in step]
    plain = [micro.rows[0] for step in steps(1, 1, 1, 5, shuffle=False) for micro in step]
    assert plain == list(range(ROWS))


def test_resume_in_the_middle_of_an_epoch_happens_once() -> None:
    whole, resumed = sampler(2, 2, 2, rank=1), sampler(2, 2, 2, rank=1)
    for one in (whole, resumed):
        one.set_epoch(4)
    resumed.resume_at(4, 3)
    assert len(resumed) == len(whole) == 10
    assert list(resumed) == list(whole)[6:]
    for one in (whole, resumed):
        one.set_epoch(5)
    assert list(resumed) == list(whole)


def test_a_trainer_in_another_epoch_is_refused() -> None:
    one = sampler()
    one.resume_at(1, 2)
    with pytest.raises(RuntimeError, match=r"resumed in epoch 1, but the trainer is in epoch 0.*restore_progress"):
        next(iter(one))


def test_lightning_takes_it_for_a_distributed_sampler() -> None:
    assert isinstance(sampler(), DistributedSampler)
