import pytest

from src.callbacks.loss_spike import LossSpike


def test_a_jump_is_a_spike_and_noise_is_none() -> None:
    spike = LossSpike(deviations=6, memory=20)
    for step in range(60):
        loss = 2.0 - 0.001 * step + (0.02 if step % 2 else -0.02)
        assert not spike.is_spike(loss)
        spike.update(loss)
    assert spike.is_spike(2.5) and not spike.is_spike(2.05)


@pytest.mark.parametrize("seen", [0, 19])
def test_nothing_is_said_before_enough_was_seen(seen: int) -> None:
    spike = LossSpike(memory=20)
    for _ in range(seen):
        spike.update(1.0)
    assert not spike.is_spike(100.0)
