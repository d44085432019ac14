"""What ranks of an SP group send back of a bf16 tensor is summed in fp32: rounded once, whatever SP is."""

from types import SimpleNamespace

import pytest
import torch

from src.strategies import sequence_parallel


@pytest.mark.parametrize("size", [2, 4, 8])
def test_gradients_of_a_gather_are_rounded_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    arrived = torch.randn(size, 50, 3).to(torch.bfloat16)  # one rank's part of every rank's gradient
    monkeypatch.setattr(sequence_parallel, "_exchange", lambda x, group: arrived)
    group = SimpleNamespace(group=SimpleNamespace(size=lambda: size))
    gradient, _ = sequence_parallel._AllGather.backward(group, torch.empty(size * 50, 3, dtype=torch.bfloat16))
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), arrived.double().sum(0), rtol=2**-8, atol=1e-6)
