"""Imported by spawn.py's server: what DeepSpeed imports, compiles and loads in each process when an engine starts."""

from contextlib import suppress

import deepspeed.git_version_info  # compiles programs to see what there is
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # all of torch.compile with it
import torch._subclasses.schema_check_mode
import torch.profiler._cupti_monitor
import torch.utils.serialization  # noqa: F401
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

from src.strategies.operators import prepare_builds

with suppress(Exception):  # a test that needs an operator says why there is none
    prepare_builds()
    ShareMemCommBuilder().load()
    CPUAdamBuilder().load()
