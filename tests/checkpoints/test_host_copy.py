"""The copy that is saved while training goes on: equal, apart, and no larger than what DeepSpeed would save."""

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from torch import nn

from src.checkpoints.host_copy import KEPT, HostMemory, host_copy, nbytes

from .equality import differences


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def state() -> dict[str, Any]:
    flat = torch.randn(1000)
    large = torch.randn(KEPT // 4 + 7)  # in memory that is kept
    scaler = LossScaler(2.0)
    return {
        "module": OrderedDict(a=flat[:600].view(20, 30), b=flat[600:], a_again=flat[:600].view(20, 30)),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": large}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "view": torch.randn(100, 50)[:, :10],
        "tail": [torch.arange(1000)[990:]],
        "parameter": nn.Parameter(torch.randn(5)),
        "half": (torch.randn(5).bfloat16(), torch.empty(0), torch.tensor(7)),
        "scaler": scaler,
        "shape": torch.Size([2, 3]),
        "path": Path("x"),
    }


def plain(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"parameter": state["parameter"].detach()}


def test_the_copy_is_equal_and_what_happens_next_does_not_reach_it() -> None:
    original = state()
    copied = host_copy(original, HostMemory())
    assert not differences(plain(original), copied)
    before = saved(copied)
    with torch.no_grad():
        for tensor in (original["module"]["a"], original["module"]["b"], original["view"], original["tail"][0]):
            tensor.add_(1)
        original["parameter"].add_(1)
        original["optimizer"]["state"][0]["exp_avg"].zero_()
        original["half"][2].fill_(9)
    original["optimizer"]["state"][0]["step"] = 4
    original["optimizer"]["param_groups"][0]["lr"] = 0.0
    original["scaler"].cur_scale = 1.0
    assert saved(copied) == before and differences(plain(original), copied)


def test_shared_storages_stay_shared_and_views_leave_the_rest_behind() -> None:
    original = state()
    copied = host_copy(original, HostMemory())
    module = copied["module"]
    assert module["a"].untyped_storage().data_ptr() == module["b"].untyped_storage().data_ptr()
    assert nbytes(module) == 4000  # as one flat buffer, each element once
    assert nbytes(copied["view"]) == 100 * 10 * 4 and nbytes(copied["tail"]) == 10 * 8
    assert nbytes(copied) < nbytes(original) and len(saved(copied)) < len(saved(original))
    assert 0 < len(saved(copied)) - nbytes(copied) < 20_000  # what it says is what is written, but for headers


def test_memory_is_kept_for_the_next_copy_and_never_shared_by_two_tensors() -> None:
    memory, size = HostMemory(), KEPT // 4
    original = {name: torch.randn(size) for name in ("a", "b")}
    first = host_copy(original, memory)
    places = {tensor.data_ptr() for tensor in first.values()}
    second = host_copy(original, memory)  # while the first is there
    assert len(places) == 2 and places.isdisjoint(tensor.data_ptr() for tensor in second.values())
    memory.reuse()
    original["a"].zero_()
    third = host_copy({"a": original["a"]}, memory)
    assert not differences(third, {"a": torch.zeros(size)}) and third["a"].data_ptr() in places | {
        tensor.data_ptr() for tensor in second.values()
    }
    del first, second, third
    memory.reuse()
    assert sum(len(buffers) for buffers in memory._free.values()) == 1  # what the last copy did not need is let go
