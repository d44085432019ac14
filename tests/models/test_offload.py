"""What waits in host memory for a backward pass that does not come is dropped by the next forward pass."""

import torch

from src.models.offload import HostStack, Waiting

from .tiny import DEEPSEEK_V3, oracle, ours


def left_over(stack: HostStack) -> torch.Tensor:
    """Puts what a forward pass on a CUDA device would leave; its buffer."""
    item = Waiting(torch.zeros(2))
    item.host = torch.empty(8, dtype=torch.uint8)
    stack._waiting[id(item)] = item
    return item.host


def test_a_forward_pass_drops_what_was_left_and_uses_its_memory_again() -> None:
    model = ours(DEEPSEEK_V3, oracle(DEEPSEEK_V3))
    buffer = left_over(model.host)
    ids, bounds = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4], dtype=torch.int32)
    with torch.no_grad():
        model(ids, ids, bounds, 4)  # an evaluation may stand between a forward pass and its backward
    assert model.host._waiting
    model(ids, ids, bounds, 4)
    assert not model.host._waiting
    assert model.host._buffer(8) is buffer


def test_tensors_on_the_cpu_stay_where_they_are() -> None:
    stack, tensor = HostStack(), torch.zeros(3)
    assert stack.take(stack.put(tensor)) is tensor
