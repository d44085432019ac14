"""ZeRO-3's gather and reduction, at a cost to the host that does not depend on the number of ranks.

DeepSpeed 0.19.8 makes one view per rank and parameter in each of them: a micro-step of four layers takes the host 1.7 s
at 32 ranks and 7.9 s at 1,024. Here a parameter is one strided view over all ranks. Bytes move as rarely as they can:

- A large parameter is gathered into memory of its own and used where it lies. Small ones share a flat buffer, and are
  copied out of it.
- Memory of released parameters is gathered into again at once: the stream that gathers waits for the one that computes.
  PyTorch's allocator would keep it until the device has passed its last use, while the host runs ahead and takes new
  memory: nine shards of DeepSeek-V3 where two are in use, until the GPU is full and every step flushes the cache.
- Gradients are cast, divided and laid out by rank in one pass. A large one goes in pieces, so that its fp32 copy is
  never whole.

Results are bit-equal to DeepSpeed's (`tests/strategies/test_zero3_collectives.py`). What is not done here (quantized
gathers, secondary partitions, NVMe) stays DeepSpeed's.

Parameters may be partitioned over different groups of ranks (`expert_parallel.py`). Every rank starts the gathers of
its groups in one order, that of the parameters' numbers; DeepSpeed names them in a set's, which differs between ranks.

Legend: W ranks, n elements of a rank's partition of one parameter, padding included, N the sum of n over a bucket.
"""

import importlib.util
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from . import zero_limits
from .bf16_reduction import BF16Reduction

_TRITON = importlib.util.find_spec("triton") is not None


class _Bucket:
    """Parameters of one group and dtype that are under way, in the memory that they come to."""

    def __init__(self, works: list[Any], buffers: list[tuple[Tensor, list[Any]]]) -> None:
        self._works, self._buffers = works, buffers
        self.params = [p for _, params in buffers for p in params]

    def wait(self, handle_dependency: bool = True) -> None:
        """Makes them available on the current stream."""
        for work in self._works:
            work.wait()
        for flat, params in self._buffers:
            parts = flat.split([p.ds_tensor.ds_numel for p in params], 1)
            for param, part in zip(params, parts, strict=True):
                # Contiguous as it is where it has the buffer for itself. A part of one element per rank is not, though
                # `reshape` could view it, which would keep the whole buffer alive.
                whole = part.contiguous().view(-1)
                param.data = whole[: param.ds_numel].view(param.ds_shape)
                param.ds_status = ZeroParamStatus.AVAILABLE
        self._works, self._buffers = [], []


class _Gathered:
    """What one call of DeepSpeed's has under way: a bucket for each group and dtype."""

    def __init__(self, buckets: list[_Bucket]) -> None:
        self._buckets = buckets

    def of(self, param: Any) -> _Bucket:
        return next(bucket for bucket in self._buckets if any(p is param for p in bucket.params))

    def wait(self, handle_dependency: bool = True) -> None:
        for bucket in self._buckets:
            bucket.wait()


_register = InflightParamRegistry.__setitem__


def _register_bucket(registry: InflightParamRegistry, param: Any, handle: Any) -> None:
    """A module waits for the groups of its own parameters: not a dense one for the experts gathered in the same call,
    which come from other nodes."""
    _register(registry, param, handle.of(param) if isinstance(handle, _Gathered) else handle)


def _launch(params: list[Any], device: torch.device) -> _Bucket:
    """Starts the gather of parameters of one group and dtype, as one launch."""
    first = params[0]
    alone = first.ds_zero_partition_world_size == 1  # experts that no other rank has
    if device.type == "cuda" and not (alone and first.ds_tensor.device == device):
        for param in params:
            param.gathered_on = torch.cuda.current_stream(device)
    if alone:  # used where they lie, or copied from the host
        return _Bucket([], [(p.ds_tensor.data.to(device, non_blocking=True).view(1, -1), [p]) for p in params])
    group, world, rank = first.ds_process_group, first.ds_zero_partition_world_size, first.ds_zero_partition_rank
    dtype = first.ds_tensor.dtype
    large = [p for p in params if p.ds_numel * dtype.itemsize >= zero_limits.OWN_MEMORY]
    small = [p for p in params if p.ds_numel * dtype.itemsize < zero_limits.OWN_MEMORY]
    buffers, parts = list[tuple[Tensor, list[Any]]](), list[Tensor]()
    for members in [*([p] for p in large), *([small] if small else [])]:
        sizes = [p.ds_tensor.ds_numel for p in members]
        flat = torch.empty(world, sum(sizes), dtype=dtype, device=device)  # [W, N]
        part = members[0].ds_tensor.data
        if len(members) > 1 or part.device != flat.device:
            part = flat[rank]
            torch._foreach_copy_(list(part.split(sizes)), [p.ds_tensor.data for p in members], non_blocking=True)
        buffers.append((flat, members))
        parts.append(part)
    if len(parts) == 1:
        return _Bucket(
            [dist.all_gather_into_tensor(buffers[0][0].view(-1), parts[0], group=group, async_op=True)], buffers
        )
    with dist._coalescing_manager(group=group, async_ops=True) as work:
        for (flat, _), part in zip(buffers, parts, strict=True):
            dist.all_gather_into_tensor(flat.view(-1), part, group=group, async_op=True)
    return _Bucket([work], buffers)


@torch.no_grad()
def _gather(device: torch.device, params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> _Gathered:
    """Starts the gather of parameters that are not there to `device`. Ranks may name them in any order."""
    buckets: dict[tuple[int, torch.dtype], list[Any]] = {}
    for param in sorted(params, key=lambda p: p.ds_id):
        if param.ds_status != ZeroParamStatus.NOT_AVAILABLE:
            raise RuntimeError(f"a parameter is gathered that is there or under way: {param.ds_summary()}")
        param.ds_status = ZeroParamStatus.INFLIGHT
        buckets.setdefault((id(param.ds_process_group), param.ds_tensor.dtype), []).append(param)
    return _Gathered([_launch(bucket, device) for bucket in buckets.values()])


_free_later = partition_parameters.free_param


def _free(param: Any) -> None:
    """As `free_param`: gives up what the stream that computes has used; what gathers next comes behind that use.

    The wait comes now and not with the next gather: before the allocator returns memory to the device, it waits for the
    stream that it was allocated on alone.
    """
    stream = None if param.ds_active_sub_modules else vars(param).pop("gathered_on", None)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        param.data = torch.empty(0, dtype=param.dtype, device=param.device)
    _free_later(param)


def gather_by_one_view(parameter: Any, init: Init) -> None:
    """Has a ZeRO-3 parameter gathered by this file, unless `init` asks for what only DeepSpeed's gather does."""
    theirs = (
        init.quantized_weights
        or init.quantized_nontrainable_weights
        or init.zero_param_process_group is not None
        or init.param_swapper is not None
        or init.use_all_reduce_for_fetch_params
        or init.allgather_sequential
        or dist.get_world_size() == 1
    )
    if not theirs:
        partition_parameters.free_param = _free
        InflightParamRegistry.__setitem__ = _register_bucket
        parameter.all_gather_coalesced = partial(_gather, init.local_device)


def _lay_out(rows: Tensor, gradient: Tensor, size: int, begin: int, divisor: int) -> None:
    """Writes elements [begin, begin + c) of every rank's part of `gradient`, divided, to rows [W, c], in their dtype.

    size: n, the elements of a rank's part; the last rank that has one may have less, ranks after it nothing.
    """
    flat, stop = gradient.reshape(-1), begin + rows.shape[1]
    if _TRITON and rows.is_cuda and rows.dtype == torch.float32:
        from .triton_layout import lay_out

        return lay_out(rows, flat, size, begin, divisor)
    by = torch.full((1,), float(divisor), dtype=rows.dtype, device=rows.device)  # of one element, not none: it promotes
    whole, rest = divmod(len(flat), size)
    torch.div(flat[: whole * size].view(whole, size)[:, begin:stop], by, out=rows[:whole])
    if rest > begin:
        last = flat[whole * size + begin : whole * size + min(rest, stop)]
        torch.div(last, by, out=rows[whole, : len(last)])


@torch.no_grad()
def reduce_scatter(
    gradients: Sequence[Tensor], group: dist.ProcessGroup | None, dtype: torch.dtype, divisor: int
) -> list[Tensor]:
    """Sums gradients over the ranks and divides them, all in `dtype`; returns this rank's part of each, flattened.

    A part has ceil(numel / W) elements, fewer or none where the tensor ends. A single gradient of this dtype and of a
    multiple of W elements is overwritten.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [math.ceil(g.numel() / world) for g in gradients]
    first, total = gradients[0], sum(sizes)
    own = [max(0, min(n, g.numel() - rank * n)) for g, n in zip(gradients, sizes, strict=True)]
    if len(gradients) == 1 and first.dtype == dtype and first.numel() == world * total and first.is_contiguous():
        flat = first.view(world, total).div_(divisor)
        parts = _scatter(flat, flat[rank], group)
        return [parts]
    if len(gradients) == 1 and zero_limits.reduced_in_pieces(first.numel(), world):
        return [_in_pieces(first, total, group, dtype, divisor)[: own[0]]]
    flat = first.new_empty(world, total, dtype=dtype)  # [W, N]
    for rows, gradient, n in zip(flat.split(sizes, 1), gradients, sizes, strict=True):
        _lay_out(rows, gradient, n, 0, divisor)
    parts = _scatter(flat, flat[rank], group)
    return [part[:n] for part, n in zip(parts.split(sizes), own, strict=True)]


def _scatter(flat: Tensor, out: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if len(flat) > 1:
        dist.reduce_scatter_tensor(out, flat.view(-1), group=group)
    return out


def _in_pieces(
    gradient: Tensor, size: int, group: dist.ProcessGroup | None, dtype: torch.dtype, divisor: int
) -> Tensor:
    """`reduce_scatter` of one large gradient, `zero_limits.PIECE` elements at a time. Returns [n]."""
    world = dist.get_world_size(group)
    out = gradient.new_empty(size, dtype=dtype)
    columns, works = max(1, zero_limits.PIECE // world), list[Any]()
    for begin in range(0, size, columns):
        if len(works) > 1:
            works.pop(0).wait()  # its memory is the next piece's
        part = out[begin : begin + columns]
        rows = out.new_empty(world, len(part))
        _lay_out(rows, gradient, size, begin, divisor)
        works.append(dist.reduce_scatter_tensor(part, rows.view(-1), group=group, async_op=True))
    for work in works:
        work.wait()
    return out


def reduce_by_one_view(optimizer: Any, halved: BF16Reduction | None = None) -> None:
    """Has a ZeRO-3 optimizer reduce its gradients by this file, unless it is set to what only DeepSpeed does.

    halved: reduces those that it takes.
    """
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return
    if optimizer.gradient_predivide_factor != 1.0 or optimizer.all2all_process_group is not None or optimizer.zenflow:
        return

    def reduce(params: list[Any], dtype: torch.dtype) -> list[Tensor]:
        optimizer._assert_same_partition_group(params)
        group = optimizer._get_param_partition_group(params[0])
        divisor = optimizer._gradient_averaging_world_size(params, dist.get_world_size(group))
        is_half = [halved is not None and halved.takes(p) for p in params]
        half = [p.grad for p, is_so in zip(params, is_half, strict=True) if is_so]
        whole = [p.grad for p, is_so in zip(params, is_half, strict=True) if not is_so]
        halves = iter(halved.reduce_scatter(half, dist.get_rank(group), divisor) if halved and half else ())
        wholes = iter(reduce_scatter(whole, group, dtype, divisor) if whole else ())
        parts = [next(halves if is_so else wholes) for is_so in is_half]
        return [part.to(optimizer.gradient_accumulation_dtype) for part in parts]

    optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = reduce
