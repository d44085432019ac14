"""Each wait between the stream that computes and the one that copies, with the other held back by a long sleep.

A wait that is missing shows at once: the copy reads what is not computed yet, or memory that was given to others.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from src.models.offload import HostStack

pytestmark = pytest.mark.gpu
NUMEL = 2**22
CYCLES = 10**9  # half a second


@pytest.fixture
def stack() -> HostStack:
    """With its stream and its buffers made, which allocations would otherwise synchronise."""
    torch.cuda.empty_cache()
    made = HostStack()
    made.begin(1)
    for item in [made.put(full(0)) for _ in range(2)][::-1]:
        made.take(item)
    made.begin(1)
    torch.cuda.synchronize()
    return made


def full(value: float) -> Tensor:
    return torch.full((NUMEL,), value, device="cuda")


@contextmanager
def copies_held_back(stack: HostStack) -> Iterator[None]:
    assert stack._stream is not None
    with torch.cuda.stream(stack._stream):
        torch.cuda._sleep(CYCLES)
    yield


def test_a_copy_out_waits_for_what_is_computed(stack: HostStack) -> None:
    tensor = full(0)
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    tensor.fill_(7)
    item = stack.put(tensor)
    assert torch.equal(stack.take(item), full(7))


def test_memory_is_not_given_to_others_before_it_is_copied_out(stack: HostStack) -> None:
    tensor = full(7)
    torch.cuda.synchronize()
    with copies_held_back(stack):
        item = stack.put(tensor)
        place = tensor.data_ptr()
        del tensor
        others = [full(9) for _ in range(4)]
    assert torch.equal(stack.take(item), full(7))
    assert place not in [other.data_ptr() for other in others]


def test_what_is_taken_waits_for_its_copy_in(stack: HostStack) -> None:
    item = stack.put(full(7))
    torch.cuda.synchronize()
    with copies_held_back(stack):
        taken = stack.take(item).clone()
    assert torch.equal(taken, full(7))


def test_memory_is_not_fetched_into_before_its_last_use(stack: HostStack) -> None:
    items = [stack.put(full(value)) for value in range(8)]
    torch.cuda.synchronize()
    stack.ahead = 0  # each is fetched when it is asked for
    taken = stack.take(items.pop())
    place = taken.data_ptr()
    torch.cuda._sleep(CYCLES)
    used = taken.clone()  # on the stream that computes, which is held back
    del taken
    later = [stack.take(item) for item in reversed(items)]  # more than the allocator has free places for
    torch.cuda.synchronize()
    assert torch.equal(used, full(7))
    assert place not in [tensor.data_ptr() for tensor in later]
    assert all(torch.equal(tensor, full(value)) for tensor, value in zip(later, range(6, -1, -1), strict=True))
