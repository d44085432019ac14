"""Page-locked host memory of exactly the size that is asked for.

PyTorch's own pinned allocations are rounded up to a power of two, so that 9.9 GiB take 16, and are never given back.
"""

import ctypes
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor


def pinned(nbytes: int) -> Tensor:
    """Zeros, uint8 [nbytes], given back when the last tensor that shares them goes; not page-locked without CUDA.

    Raises:
        RuntimeError: the system does not let so much memory be locked.
    """
    memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages, which are faster to touch and to copy
        memory.madvise(mmap.MADV_HUGEPAGE)
    # Not in processes forked later, as loaders' workers are: the system would copy locked pages for each of them, or
    # move this process's at its next write, away from those that the device knows.
    memory.madvise(mmap.MADV_DONTFORK)
    buffer = (ctypes.c_uint8 * len(memory)).from_buffer(memory)  # its finalizer runs before the memory is unmapped
    tensor = torch.frombuffer(buffer, dtype=torch.uint8)
    if torch.cuda.is_available():
        runtime, address = torch.cuda.cudart(), tensor.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(address, tensor.nbytes, 0))
        weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False
    return tensor[:nbytes]


def pinned_copy(tensor: Tensor) -> Tensor:
    """A CPU tensor's copy in pinned memory."""
    return pinned(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)
