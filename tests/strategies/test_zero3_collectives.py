"""Our gather and reduction equal DeepSpeed's bit for bit, and cost the host the same at any world size."""

import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import deepspeed
import deepspeed.runtime.comm.coalesced_collectives as theirs
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry
from torch.utils._python_dispatch import TorchDispatchMode

from src.models.deepseek_v3 import ExpertShard
from src.rehearsal.loopback import LoopbackGroup, join
from src.strategies import zero_limits
from src.strategies.expert_parallel import ProcessGroupEP, make_groups
from src.strategies.parallel_dims import ParallelDims
from src.strategies.partition import _EmptyPartitions, materialise
from src.strategies.zero3_collectives import reduce_by_one_view, reduce_scatter
from tests.distributed.spawn import run_distributed

# One element per rank, padding, a part that ends early, ranks without any, a matrix, one alone in its bucket.
SHAPES: list[tuple[int, ...]] = [(512,), (7,), (1000,), (3,), (31, 17), (64, 64), (1,)]


def by_element(self: LoopbackGroup, out: torch.Tensor, part: torch.Tensor) -> None:
    """Other ranks' parts made element by element, so that they are the same however parameters share a gather."""
    ranks = torch.arange(self._size, dtype=part.dtype, device=part.device)[:, None]
    out.view(self._size, -1).copy_(part.clone() + ranks)


class Calls(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name = Counter[str]()

    @property
    def count(self) -> int:
        return self.by_name.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.by_name[str(func)] += 1
        return func(*args, **(kwargs or {}))


def parameters(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, offload: bool = False, group: ProcessGroupEP | None = None
) -> list[Any]:
    """ZeRO-3 parameters with random partitions, each with DeepSpeed's own gather as `theirs`; with a group every other
    one an expert's."""
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    init, made = _EmptyPartitions(config_dict_or_path=config, dtype=None), []
    for number, shape in enumerate(shapes):
        shared = group if number % 2 else None
        parameter: Any = init.partition(torch.nn.Parameter(torch.empty(shape, device="meta")), dtype, shared)
        parameter.ours = parameter.all_gather_coalesced
        whole = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=init.local_device))
        if shared is not None:
            shared.place(whole)
        init._convert_to_deepspeed_param(whole)
        parameter.theirs = whole.all_gather_coalesced  # type: ignore[attr-defined]
        parameter.ds_tensor.normal_()
        made.append(parameter)
    return made


def gathered(params: list[Any], gather: Any) -> list[torch.Tensor]:
    gather(params).wait()
    values = [p.data.clone() for p in params]
    assert all(p.ds_status == ZeroParamStatus.AVAILABLE for p in params)
    for p in params:
        p.partition()
    return values


def begin(world: int, device: str = "cpu") -> None:
    os.environ["DS_ACCELERATOR"] = device
    if world > 2:
        LoopbackGroup._gather = by_element  # type: ignore[method-assign]
        join(world)
    deepspeed.init_distributed("gloo")


def gathers(world: int, dtype: torch.dtype, own_memory: int, device: str = "cpu", offload: bool = False) -> None:
    begin(world, device)
    torch.manual_seed(dist.get_rank())
    zero_limits.OWN_MEMORY = own_memory
    params = parameters(SHAPES, dtype, offload)
    assert params[0].ds_tensor.device.type == ("cpu" if offload else device)
    for chosen in (params, params[:1], params[-2:], params[::-1]):
        ours = gathered(chosen, chosen[0].ours)
        for a, b, p in zip(ours, gathered(chosen, chosen[0].theirs), chosen, strict=True):
            assert a.shape == p.ds_shape and torch.equal(a, b)
    # What a parameter holds is its own memory, not the buffer that it came in.
    params[0].ours(params).wait()
    for p in params:
        large = p.ds_numel * dtype.itemsize >= own_memory
        assert p.data.untyped_storage().nbytes() <= (p.ds_numel + large * world + world) * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("own_memory", [0, 3000, 2**30])
@pytest.mark.parametrize("world", [2, 8, 512])
def test_gathers_are_deepspeeds(world: int, own_memory: int, dtype: torch.dtype) -> None:
    run_distributed(gathers, world if world == 2 else 1, world, dtype, own_memory)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("own_memory", [0, 3000, 2**30])
@pytest.mark.parametrize("world", [8, 512])
def test_gathers_are_deepspeeds_on_a_gpu(world: int, own_memory: int, offload: bool) -> None:
    run_distributed(gathers, 1, world, torch.bfloat16, own_memory, "cuda", offload)


def reductions(world: int, dtype: torch.dtype, piece: int, device: str = "cpu") -> None:
    begin(world, device)
    torch.manual_seed(dist.get_rank())
    zero_limits.PIECE = piece
    whole: list[tuple[int, ...]] = [(world * 37,), (world, 8), (world * 40 + 3,), (world - 1, 3)]
    buckets: list[list[tuple[int, ...]]] = [SHAPES, [(512,)], *([s] for s in whole), whole]
    for shapes in buckets:
        gradients = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
        expected = theirs.reduce_scatter_coalesced([g.float().clone() for g in gradients])
        ours = reduce_scatter([g.clone() for g in gradients], None, torch.float32, world)
        assert len(ours) == len(expected)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("piece", [2, 64, 2**28])
@pytest.mark.parametrize("world", [2, 8, 512])
def test_reductions_are_deepspeeds(world: int, piece: int, dtype: torch.dtype) -> None:
    run_distributed(reductions, world if world == 2 else 1, world, dtype, piece)


@pytest.mark.gpu
@pytest.mark.parametrize("piece", [2, 64, 2**28])
@pytest.mark.parametrize("world", [8, 512])
def test_reductions_are_deepspeeds_on_a_gpu(world: int, piece: int) -> None:
    run_distributed(reductions, 1, world, torch.bfloat16, piece, "cuda")


def shared(ep: int) -> None:
    begin(2)
    torch.manual_seed(dist.get_rank())
    zero_limits.OWN_MEMORY = 3000
    group = make_groups(ParallelDims(4, 1, dist.get_rank(), ep), None)
    params = parameters(SHAPES, torch.float32, group=group)
    for chosen in (params, params[::-1], params[1:2], params[1:4]):
        ours = gathered(chosen, chosen[0].ours)
        assert all(torch.equal(a, b) for a, b in zip(ours, gathered(chosen, chosen[0].theirs), strict=True))

    handle, registry = params[0].ours(params), InflightParamRegistry()
    for p in params:
        registry[p] = handle
    registry.pop(params[0]).wait()  # a dense one, and those of its group
    states = {0: ZeroParamStatus.AVAILABLE, 1: ZeroParamStatus.INFLIGHT}
    assert [p.ds_status for p in params] == [states[number % 2] for number in range(len(params))]
    registry.pop(params[1]).wait()
    assert all(p.ds_status == ZeroParamStatus.AVAILABLE for p in params)

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    model = torch.nn.ModuleList(
        [torch.nn.Linear(5, 7, device="meta"), ExpertShard(2, 5, 3).to("meta"), ExpertShard(1, 5, 3).to("meta")]
    )
    materialise(model, config, 3, torch.device("cpu"), group)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config | {"zero_allow_untested_optimizer": True}
    )
    zero: Any = engine.optimizer
    experts = [p for p in model.parameters() if hasattr(p, "ds_zero_placement_family")]
    dense = [p for p in model.parameters() if not hasattr(p, "ds_zero_placement_family")]
    assert len(experts) == 4 and len(dense) == 2
    theirs = {}
    for is_ours in (False, True):
        if is_ours:
            reduce_by_one_view(zero)
        for name, members in (("experts", experts), ("dense", dense)):
            torch.manual_seed(dist.get_rank())
            reduced: list[Any] = [SimpleNamespace(**vars(p) | {"grad": torch.randn(p.ds_shape)}) for p in members]  # type: ignore[attr-defined]
            parts = zero._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(reduced, torch.float32)
            if not is_ours:
                theirs[name] = parts
            assert all(torch.equal(a, b) for a, b in zip(parts, theirs[name], strict=True)), name


@pytest.mark.parametrize("ep", [2, 4])
def test_shared_experts_are_gathered_and_reduced_as_deepspeed_does(ep: int) -> None:
    run_distributed(shared, 4, ep)


def operations(world: int) -> tuple[int, int]:
    begin(world)
    params = parameters([(world * n,) for n in (64, 100, 3)], torch.bfloat16)
    gradients = [torch.randn(world * n) for n in (64, 100, 3)]
    with Calls() as gather:
        params[0].ours(params).wait()
    with Calls() as reduction:
        reduce_scatter(gradients, None, torch.float32, world)
    return gather.count, reduction.count


def test_the_host_does_the_same_at_any_world_size() -> None:
    small, large = (run_distributed(operations, 1, world)[0] for world in (8, 1024))
    assert small == large and min(small) > 0


def used_again(_: int) -> None:
    begin(8, "cuda")
    first, second = parameters([(8 * 2**22,), (8 * 2**22,)], torch.bfloat16)
    gathering = torch.cuda.Stream()
    with torch.cuda.stream(gathering):
        first.ours([first]).wait()
    torch.cuda.current_stream().wait_stream(gathering)
    expected, place = first.data.double().sum(), first.data.data_ptr()
    torch.cuda._sleep(10**9)  # the host runs ahead of a computation that still needs the first
    later = first.data.double().sum()
    first.partition()
    assert first.data.numel() == 0
    with torch.cuda.stream(gathering):
        second.ours([second]).wait()
    assert second.data.data_ptr() == place
    torch.cuda.current_stream().wait_stream(gathering)
    assert later.item() == expected.item() != second.data.double().sum().item()


@pytest.mark.gpu
def test_released_memory_is_gathered_into_behind_its_last_use() -> None:
    run_distributed(used_again, 1, 0)
