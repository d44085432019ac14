import pytest

from src.models.learning_rate import warmup_cosine


def test_warm_up_then_a_cosine_to_the_floor() -> None:
    rates = [warmup_cosine(step, total=14, warmup=4, floor=0.1) for step in range(16)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[9] == pytest.approx(0.55)  # the middle of the cosine
    assert all(later < earlier for earlier, later in zip(rates[4:14], rates[5:15], strict=True))
    assert rates[13] > 0.1 and rates[14] == rates[15] == pytest.approx(0.1)


def test_without_warm_up_the_first_step_is_whole() -> None:
    assert warmup_cosine(0, total=1, warmup=0, floor=0.0) == 1.0
