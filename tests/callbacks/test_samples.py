"""Arguments of sampling, and draws that depend on seed, prompt and position alone."""

from typing import Any

import pytest
import torch

from src.callbacks.samples import Samples


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 5}, r"samples.every_n_steps is 5, but there are no prompts: give --samples.prompts"),
        ({"every_n_steps": -1}, r"samples.every_n_steps is -1; it must be at least 0"),
        ({"max_new_tokens": 0}, r"samples.max_new_tokens is 0; it must be at least 1"),
        ({"temperature": -0.5}, r"samples.temperature is -0.5; it must be at least 0"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Samples(**arguments)


def test_draws_repeat_and_leave_the_global_generator_alone() -> None:
    logits = torch.zeros(1000)
    before = torch.get_rng_state()
    hot, other = Samples(temperature=1.0), Samples(temperature=1.0, seed=1)
    places = [(index, position) for index in range(3) for position in range(3)]
    draws = [[sampler._pick(logits, *place) for place in places] for sampler in (hot, hot, other)]
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) > 5
    assert torch.equal(torch.get_rng_state(), before)
    logits[17] = 5.0
    assert Samples()._pick(logits, 0, 0) == 17
    assert Samples(temperature=0.1)._pick(logits, 0, 0) == 17  # e^50 to 999
