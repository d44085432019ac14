"""The group that shares a layer's experts, and where ZeRO-3 keeps them: over the ranks that have the same ones.

DeepSpeed (0.19.8) partitions a parameter over the process group that it is told, and needs to know that the other ranks
hold other parameters: its averages are over the world and its norms over all experts only where the parameter says that
it is of the family of experts, and by which name the group of the other ranks is found.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import deepspeed.utils.groups as deepspeed_groups
import torch.distributed as dist
from torch import Tensor

from .parallel_dims import ParallelDims
from .zero_limits import check_goes_with

# Of ZeRO-3's settings those that keep or move weights in a way of their own, with the values that turn them off.
_OTHERS: dict[str, Any] = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "mics_shard_size": -1,
}


class _Exchanged:
    """Rows on their way; what was sent is held until they are waited for."""

    def __init__(self, work: Any, sent: Tensor, out: Tensor) -> None:
        self._work, self._sent, self._out = work, sent, out

    def wait(self) -> Tensor:
        self._work.wait()
        del self._sent
        return self._out


class ProcessGroupEP:
    """`models.deepseek_v3.ExpertParallelGroup` over torch.distributed groups.

    group: the ranks that have all experts once. same: those that have this rank's.
    """

    def __init__(self, group: dist.ProcessGroup, same: dist.ProcessGroup) -> None:
        self.group, self.same = group, same
        self.rank, self.size = group.rank(), group.size()
        self._name = f"ep_size_{self.size}"
        deepspeed_groups._EXPERT_PARALLEL_GROUP[self._name] = group
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[self._name] = same

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> "_Exchanged":
        rows, out = rows.contiguous(), rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(out, rows, list(received), list(sent), group=self.group, async_op=True)
        return _Exchanged(work, rows, out)

    def place(self, parameter: Any) -> None:
        """Says of an expert's parameter where it is partitioned, before DeepSpeed converts it."""
        parameter.ds_zero_partition_process_group = self.same
        parameter.ds_zero_placement_family = "autoep_expert"
        parameter.ds_zero_partition_group_name = self._name


def make_groups(dims: ParallelDims, timeout: timedelta | None) -> ProcessGroupEP:
    """To be called by all ranks."""
    groups = [
        dist.new_subgroups_by_enumeration(ranks, timeout=timeout)[0]
        for ranks in (dims.ep_groups, dims.expert_dp_groups)
    ]
    return ProcessGroupEP(*groups)


def check_zero(zero: dict[str, Any]) -> None:
    """Raises ValueError for settings of ZeRO under which shared experts would be wrong, or nobody has tried them."""
    kept = ("offload_optimizer", "offload_param")
    on_disk = [f"{name} to nvme" for name in kept if zero.get(name, {}).get("device") == "nvme"]
    check_goes_with("expert_parallel_size above 1", zero, _OTHERS, on_disk)
