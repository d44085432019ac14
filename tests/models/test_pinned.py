"""Pinned memory has the size asked for, and goes with its last tensor."""

import ctypes
import gc
import os
from pathlib import Path

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
    place = (ctypes.c_uint8 * 1000).from_address(address)  # never read
    assert not torch.frombuffer(place, dtype=torch.uint8).is_pinned()


def test_it_is_unlocked_before_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    unlocked = []

    class Runtime:
        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            unlocked.append(is_mapped(address))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    tensor = pinned(64 << 20)
    view, address = tensor[5:7], tensor.data_ptr()
    del tensor
    assert unlocked == [] and is_mapped(address)
    del view
    assert unlocked == [True] and not is_mapped(address)


def test_processes_forked_later_do_not_have_it() -> None:
    tensor = pinned(1 << 20)
    child = os.fork()
    if child == 0:
        os._exit(is_mapped(tensor.data_ptr()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and is_mapped(tensor.data_ptr())


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)
