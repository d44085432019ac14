"""DeepSpeed ZeRO with sequence parallelism as a Lightning strategy, on CUDA (NCCL) and on CPU (gloo)."""

import argparse
import io
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import deepspeed
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from src.checkpoints.zero_reader import ZeroCheckpointSource
from src.errors import UserError
from src.models.deepseek_v3 import DeepseekV3ForCausalLM, ExpertShard, SequenceParallelGroup, SingleProcess
from src.weights.hf_reader import HFDirectorySource
from src.weights.key_map import PerExpert
from src.weights.load import load
from src.weights.random_source import RandomSource
from src.weights.source import WeightSource

from . import bf16_reduction
from .bf16_reduction import BF16Reduction
from .checkpointing import CheckpointingStrategy
from .early_launcher import EarlyLauncher
from .expert_parallel import ProcessGroupEP, check_zero, make_groups
from .host_optimizer import HostAdamW, allocated_once, step_in_pieces
from .masters import complete, round_after_steps
from .operators import import_muon, prepare_builds
from .parallel_dims import ParallelDims
from .parallelize import (
    apply_activation_checkpointing,
    apply_zero_leaves,
    check_heads,
    share_experts,
    zero3_settings,
)
from .partition import materialise
from .rounding import NEAREST, Kind, Rounding
from .sequence_parallel import ProcessGroupSP
from .zero3_collectives import reduce_by_one_view
from .zero3_hooks import hook_owners_alone
from .zero_limits import check_goes_with, check_stage

# DeepSpeed's and our own collectives under names that torch 2.13 deprecates and torch 2.11 knows no others for.
warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)


class _ModulePrecision(DeepSpeedPrecision):
    """Lightning would cast the whole module, the routers' fp32 bias included; the model is built in its dtype."""

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


class DeepSpeedSPStrategy(CheckpointingStrategy):
    """Lightning's DeepSpeedStrategy over a DP x SP mesh.

    ZeRO partitions over the whole world, one shard a rank: DeepSpeed is told nothing of SP, and the gradient that it
    averages over the world is made a sum in `backward`. Samplers see the DP axis alone.

    Args:
        sequence_parallel_size: ranks that share a packed row; must divide the world size and the attention heads.
        expert_parallel_size: ranks that share each layer's experts and exchange the tokens for them: part of a node, or
            whole nodes. 1: every rank gathers every expert.
        stage: ZeRO stage, 0 to 3. Real models need 3.
        offload_optimizer: keep optimizer states in host memory and step there (DeepSpeedCPUAdam).
        offload_parameters: keep the parameters' partitions in host memory (stage 3).
        pin_memory: pin offloaded memory, so that copies overlap with computation; needs CUDA.
        contiguous_gradients: copy gradients into a buffer before reducing them; by default at stages 1 and 2, since the
            reduction at stage 3 lays them out itself.
        reduce_dtype: bf16 sends experts' gradients between GPUs in bf16, half the bytes, and sums them in fp32 (stage
            3). Unless each node has one rank of an expert, it rounds each node's sum once.
        reduce_node_size: processes per node for reduce_dtype bf16; null: LOCAL_WORLD_SIZE, or devices.
        kwargs: as Lightning's DeepSpeedStrategy.

    Raises:
        ValueError: sizes do not divide, settings of ZeRO do not go with expert parallelism, or no C++ compiler is found
            where DeepSpeed must build an operator.
    """

    def __init__(
        self,
        sequence_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        stage: int = 3,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        pin_memory: bool = True,
        contiguous_gradients: bool | None = None,
        reduce_dtype: Literal["fp32", "bf16"] = "fp32",
        reduce_node_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if offload_parameters:
            check_goes_with("offload_parameters", {"stage": stage}, {})
        super().__init__(
            stage=stage,
            contiguous_gradients=stage != 3 if contiguous_gradients is None else contiguous_gradients,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            pin_memory=pin_memory and torch.cuda.is_available(),
            **kwargs,
        )
        self.sequence_parallel_size = sequence_parallel_size
        self.dims: ParallelDims | None = None
        self.sp_group: SequenceParallelGroup = SingleProcess()
        self.expert_parallel_size = expert_parallel_size
        self.ep_group: ProcessGroupEP | None = None
        if expert_parallel_size > 1:
            check_zero(self._zero)
        self.reduce_dtype, self.reduce_node_size = reduce_dtype, reduce_node_size
        self._reduce_groups: list[dist.ProcessGroup] = []
        if reduce_dtype == "bf16":
            assert isinstance(self.config, dict)
            bf16_reduction.check_zero(self.config)
        self._rounding = NEAREST
        self._lower_halves: dict[str, Tensor] = {}  # of what was loaded, for the masters that are not there yet

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = EarlyLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    # -- ranks ----------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        check_stage(self._zero["stage"], self.precision_plugin.precision)
        # Past DeepSpeedStrategy's own, which refuses every accelerator but CUDA.
        DDPStrategy.setup_environment(self)

    def wait_at_least(self, minutes: float) -> None:
        """Collectives fail no sooner, so that a watchdog of `minutes` finds first what they wait for; before they are
        set up. A longer `timeout` stays."""
        self._timeout = max(self._timeout or timedelta(), timedelta(minutes=minutes))

    @override
    def setup_distributed(self) -> None:
        device = "cpu" if self.root_device.type == "cpu" else "cuda"
        if get_accelerator().device_name() != device:
            raise UserError(
                f"the Trainer runs on {device}, but DeepSpeed chose {get_accelerator().device_name()}: "
                f"set the environment variable DS_ACCELERATOR={device}."
            )
        if device == "cpu" or self.offloads_optimizer:  # shared-memory collectives, and DeepSpeedCPUAdam
            prepare_builds()
        self._check_threads()
        reset_seed()
        self.set_world_ranks()
        self.dims = ParallelDims(
            self.world_size,
            self.sequence_parallel_size,
            self.global_rank,
            self.expert_parallel_size,
            self._node_size,
        )
        with redirect_stdout(io.StringIO()):  # each rank would print that an operator is built
            self._init_deepspeed_distributed()
        if self.dims.sp > 1:
            group, _ = dist.new_subgroups_by_enumeration(self.dims.sp_groups, timeout=self._timeout)
            assert group is not None
            self.sp_group = ProcessGroupSP(group)
        if self.dims.ep > 1:
            self.ep_group = make_groups(self.dims, self._timeout)
        if self.reduce_dtype == "bf16":
            same = dist.group.WORLD if self.ep_group is None else self.ep_group.same
            assert same is not None
            self._reduce_groups = bf16_reduction.make_groups(self.dims, same, self._timeout)
        if self.dims.leaves_node:
            rank_zero_warn(
                f"expert_parallel_size {self.dims.ep} is more than the {self.num_processes} processes of a node: "
                "computation waits for tokens that travel between nodes"
            )
        self.agree_on_checkpoint()

    @property
    def _node_size(self) -> int:
        return self.reduce_node_size or int(os.environ.get("LOCAL_WORLD_SIZE", self.num_processes))

    def _check_threads(self) -> None:
        """DeepSpeedCPUAdam works with OpenMP's threads; torchrun gives each process one unless told otherwise."""
        cores = len(os.sched_getaffinity(0)) // max(1, self.num_processes)
        if self.offloads_optimizer and self.root_device.type != "cpu" and torch.get_num_threads() == 1 < cores:
            rank_zero_warn(
                f"the optimizer in host memory has one thread per process, and {cores} cores: its steps take "
                f"{cores} times as long. Set the environment variable OMP_NUM_THREADS={cores}."
            )

    @property
    def _zero(self) -> dict[str, Any]:
        assert isinstance(self.config, dict)
        return self.config.setdefault("zero_optimization", {"stage": 0})

    @property
    def offloads_optimizer(self) -> bool:
        return "offload_optimizer" in self._zero

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        assert self.dims is not None
        return {"num_replicas": self.dims.dp, "rank": self.dims.dp_rank}

    # -- the model ------------------------------------------------------------------------------------------------

    @contextmanager
    @override
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Nothing: the model is built on the meta device and gets its memory in `parallelize`."""
        self._init_config_if_needed()
        yield

    def parallelize(self, model: DeepseekV3ForCausalLM, activation_checkpointing: bool = True) -> None:
        """Makes the model, built on the meta device, this rank's part of the job: SP, recomputation, memory, ZeRO."""
        assert self.dims is not None
        check_heads(model, self.dims)
        model.set_sequence_parallel(self.sp_group)
        if self.ep_group is not None:
            share_experts(model, self.dims, self.ep_group)
        if activation_checkpointing:
            apply_activation_checkpointing(model)
        if self.zero_stage_3:
            hook_owners_alone()
            for name, value in zero3_settings(model).items():
                self._zero.setdefault(name, value)
            apply_zero_leaves(model)
        assert isinstance(self.config, dict)
        materialise(model, self.config, self._zero["stage"], self.root_device, self.ep_group)

    def load(self, model: DeepseekV3ForCausalLM, directory: str) -> None:
        """Fills the model's weights from a Hugging Face directory or a checkpoint, each rank its own partitions."""
        is_checkpoint = self.broadcast((Path(directory) / "latest").is_file())
        if is_checkpoint:
            self._check_manifest(directory)
        with self.fail_together():
            source = PerExpert(ZeroCheckpointSource(directory)) if is_checkpoint else HFDirectorySource(directory)
            self._load(model, source)

    def initialise(self, model: DeepseekV3ForCausalLM, seed: int) -> None:
        """Random weights, the same whatever the layout."""
        self._load(model, RandomSource(model.config, seed))

    def _load(self, model: DeepseekV3ForCausalLM, source: WeightSource) -> None:
        layers, keep = model.config.num_hidden_layers, self._is_fitting and self._in_memory
        self._lower_halves = load(model, source, num_hidden_layers=layers, lower_halves=keep)

    @property
    def _in_memory(self) -> bool:
        """Whether neither masters nor weights are on a disk."""
        return all(self._zero.get(f"offload_{what}", {}).get("device") != "nvme" for what in ("optimizer", "param"))

    # -- the engine -----------------------------------------------------------------------------------------------

    @override
    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        # DeepSpeed reads it for its throughput log alone; Lightning would build the dataloader early to find it.
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)
        super()._format_config()
        # Under bf16 the defaults reduce and accumulate in bf16, where 64 micro-steps lose 1 % of a gradient.
        self.config.setdefault("communication_data_type", "fp32")
        self.config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        # Our optimizer() decides; on CPU tests and on CUDA without CPU Adam the plain one is meant.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self.precision_plugin = _ModulePrecision(self.precision_plugin.precision)  # type: ignore[arg-type]
        self.model_to_device()  # the metrics; the weights are there, and partitions stay where they are offloaded
        super().setup(trainer)

    def optimizer(
        self, groups: list[dict[str, Any]], weight_rounding: Kind = "nearest", seed: int = 0, **settings: Any
    ) -> Optimizer:
        """AdamW over parameter groups, where the states live: DeepSpeed's on the host, PyTorch's on the device.

        weight_rounding: how bf16 weights follow from the masters; where it is stochastic, `seed` decides. What is on
            NVMe is rounded to the nearest.
        settings: lr, betas, eps, weight_decay.
        """
        if weight_rounding == "stochastic" and not self._in_memory:
            rank_zero_warn("masters or weights are on nvme, where weights are rounded to the nearest: offload to cpu")
            weight_rounding = "nearest"
        self._rounding = Rounding(weight_rounding, seed)
        if self.offloads_optimizer:
            return HostAdamW(groups, **settings)
        return torch.optim.AdamW(groups, fused=self.root_device.type == "cuda", **settings)

    @override
    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: LRScheduler | None = None
    ) -> tuple[deepspeed.DeepSpeedEngine, Optimizer]:
        import_muon()
        # As Lightning's, but for device_rank, which must be an int on CPU too.
        with allocated_once():
            engine, deepspeed_optimizer, _, _ = deepspeed.initialize(
                args=argparse.Namespace(device_rank=self.root_device.index or 0),
                config=self.config,
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dist_init_required=False,
            )
        assert self.lightning_module is not None
        trained = cast(nn.Module, self.lightning_module.model)
        reduce_by_one_view(engine.optimizer, self._halved(trained))
        # Before the moments on the host: what the load has kept is gone when they come.
        complete(engine, trained, self._lower_halves, self._rounding)
        step_in_pieces(engine.optimizer, round_after_steps(engine, trained, self._rounding))
        self._save_through(engine)
        return engine, deepspeed_optimizer

    def _halved(self, model: nn.Module) -> BF16Reduction | None:
        if self.reduce_dtype == "fp32":
            return None
        experts = {p.ds_id for m in model.modules() if isinstance(m, ExpertShard) for p in m.parameters()}  # type: ignore[attr-defined]
        return BF16Reduction(self._reduce_groups, experts)

    @override
    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        # As Lightning's, but for device_rank, and with every setting of the model's memory kept.
        assert isinstance(self.config, dict)
        config = {"train_micro_batch_size_per_gpu": 1}
        if self.zero_stage_3:
            config |= {key: self.config[key] for key in ("zero_optimization", "zero_allow_untested_optimizer")}
        if "bf16" in self.config:
            config["bf16"] = self.config["bf16"]
        self.model, _, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index or 0),
            config=config,
            model=model,
            model_parameters=[],
            dist_init_required=False,
        )

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Back-propagates a loss that is this rank's part of a sum over the world and the accumulated micro-steps.

        DeepSpeed averages gradients over the world; with the factor here they are summed, and with scale_wrt_gas off
        the micro-steps are too. This is the one place where the engine's averaging is undone.
        """
        return super().backward(closure_loss * self.world_size, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @property
    def gradient_norm(self) -> float | None:
        """Global norm of the last optimizer step's gradient before clipping; None before the first."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def guards_gradient(self) -> bool:
        """Whether DeepSpeed leaves out a step whose gradient is not finite; stage 0 takes it."""
        return self._zero["stage"] > 0

    @property
    def skipped_step(self) -> bool:
        """Whether the last optimizer step was left out, the weights untouched, since its gradient is not finite."""
        return bool(getattr(self.deepspeed_engine.optimizer, "overflow", False))
