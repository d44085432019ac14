"""Pinned memory has the size asked for, and goes with its last tensor."""

import gc

import pytest
import torch

from src.models.pinned import pinned, pinned_copy


@pytest.mark.parametrize("size", [0, 1, 4097, 3 << 20])
def test_it_has_the_size_asked_for(size: int) -> None:
    tensor = pinned(size)
    assert tensor.shape == (size,) and tensor.dtype == torch.uint8 and not tensor.any()
    tensor.fill_(7)


def test_a_copy_is_the_tensor() -> None:
    tensor = torch.randn(3, 5)
    assert torch.equal(pinned_copy(tensor), tensor)


@pytest.mark.gpu
def test_it_is_page_locked_until_the_last_view_goes() -> None:
    tensor = pinned(5 << 20)
    view = tensor[1000:2000].view(torch.float32)
    assert tensor.is_pinned() and view.is_pinned()
    address = tensor.data_ptr()
    del tensor
    gc.collect()
    assert view.is_pinned()
    view.copy_(torch.ones(250, device="cuda"), non_blocking=True)
    torch.cuda.synchronize()
    assert view.sum() == 250
    del view
    gc.collect()
    # Unregistered: the same address may be registered again, by whoever gets it next.
    assert int(torch.cuda.cudart().cudaHostUnregister(address)) != 0
