"""ZeRO-3's module hooks, where they do something: half of the host's time of a micro-step goes.

DeepSpeed 0.19.8 hooks every module, those without a parameter of their own too, enters an NVTX range in each of its
functions, and looks up a signature for every tensor that goes in or out. A layer of Moonlight has 17 modules, of which
five own nothing; a micro-step of it is bound by the host (`benchmarks/RESULTS.md`).
"""

from typing import Any

import deepspeed.utils.nvtx as nvtx
import torch
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.utils import z3_leaf_module
from torch import nn

_register = DeepSpeedZeRoOffload._register_deepspeed_module


def _register_owners(self: DeepSpeedZeRoOffload, module: nn.Module, count: list[int]) -> None:
    """As `_register_deepspeed_module`, for modules that own parameters, leaves and the root. count: of all modules."""
    hooked: Any = module  # DeepSpeed hangs its attributes on it
    owns = next(module.parameters(recurse=False), None) is not None
    if owns or module is self.module or z3_leaf_module(module):
        _register(self, module, count)  # comes back here for each child
        for function in (hooked.pre_bwd_fn, hooked.post_bwd_fn):
            # Past Function.apply, which binds default arguments by `inspect.signature`; these have none.
            function.apply = super(torch.autograd.Function, function).apply
        return
    hooked.ds_id, hooked.ds_recompute_parameters = count[0], set()
    for child in module.children():
        count[0] += 1
        self._register_deepspeed_module(child, count=count)


def hook_owners_alone() -> None:
    """For every ZeRO-3 engine that this process makes from now on."""
    nvtx.enable_nvtx = False
    DeepSpeedZeRoOffload._register_deepspeed_module = lambda self, module, count=None: _register_owners(
        self, module, [0] if count is None else count
    )
