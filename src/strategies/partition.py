"""Give a model that was built on the meta device its memory: whole tensors, or ZeRO-3 partitions of them.

deepspeed.zero.Init materialises every parameter whole and broadcasts it from rank 0: 1.3 TB for DeepSeek-V3, and
1.9 GB at once for a shard of 32 experts. Here a rank allocates its own partitions only; values come from the load.
"""

from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
from torch import nn

from src.models.deepseek_v3 import ExpertShard
from src.models.pinned import pinned

from .expert_parallel import ProcessGroupEP
from .zero3_collectives import gather_by_one_view


class _EmptyPartitions(deepspeed.zero.Init):
    """Used for its conversion of one parameter; never entered as a context, so nothing global is patched."""

    def partition(self, meta: nn.Parameter, dtype: torch.dtype, shared: ProcessGroupEP | None = None) -> nn.Parameter:
        """A ZeRO-3 parameter of meta's shape whose partition on this rank is zeros; shared: of an expert's."""
        # Shape without memory: a single element expanded. ZeRO reads the shape, then frees the data.
        whole = torch.empty(1, dtype=dtype, device=self.local_device).expand(meta.shape)
        parameter: Any = nn.Parameter(whole, requires_grad=meta.requires_grad)  # ZeRO hangs its attributes on it
        if shared is not None:
            shared.place(parameter)
        self._convert_to_deepspeed_param(parameter)
        aligned = self._aligned_size(parameter)
        size = aligned // parameter.ds_zero_partition_world_size
        on_device = self.local_device if parameter.ds_persist else self.remote_device
        if self.pin_memory and str(on_device) == "cpu":
            partition: Any = pinned(size * dtype.itemsize).view(dtype)
        else:
            partition = torch.zeros(size, dtype=dtype, device=on_device)
        partition.ds_numel = size
        partition.status = PartitionedParamStatus.AVAILABLE
        partition.final_location = None
        parameter.ds_tensor = partition
        parameter.ds_numel_aligned = aligned
        parameter.partition()  # partitioned already: frees the whole and marks it as not available
        gather_by_one_view(parameter, self)
        return cast(nn.Parameter, parameter)


def materialise(
    model: nn.Module,
    config: dict[str, object],
    stage: int,
    device: torch.device,
    expert_group: ProcessGroupEP | None = None,
) -> None:
    """Replaces every meta parameter and buffer of `model`, in place.

    Stage 3: ZeRO-3 parameters over the whole world, those of shared experts over the ranks that have the same, on the
    device that the DeepSpeed `config` offloads to, zeros until loaded. Stages 0 to 2: whole tensors on `device`,
    uninitialised until loaded. Buffers keep their dtype.
    """
    init = _EmptyPartitions(config_dict_or_path=config, dtype=None) if stage == 3 else None
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            if init is not None:
                shared = expert_group if isinstance(module, ExpertShard) else None
                replacement = init.partition(parameter, parameter.dtype, shared)
            else:
                replacement = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            setattr(module, name, replacement)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))
