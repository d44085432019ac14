"""What the spawned processes of these tests run, under DeepSpeed on gloo."""

from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from src.weights.hf_reader import HFDirectorySource
from src.weights.load import load
from src.weights.output import Dtype
from tests.checkpoints.tiny import CONFIG, LAYERS, StandIn, dequantised, our_shapes, stacked, stored

FROZEN = ("model.embed_tokens.weight", "model.layers.1.mlp.experts.0.down_proj")
EXPERTS_PER_SHARD = 2
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


class Checkpoints(NamedTuple):
    folder: Path
    gathered: dict[str, dict[str, Any]]  # label -> our name -> slot -> the whole tensor, from the live engine


class Setting(NamedTuple):
    stage: int
    bf16: bool = False
    freeze: bool = False
    mtp: bool = False
    offload: bool = False

    def deepspeed_config(self) -> dict[str, Any]:
        # Several sub-groups, so that a parameter's place is not in the first flat tensor alone.
        zero: dict[str, Any] = {"stage": self.stage, "sub_group_size": 100_000}
        if self.offload:
            zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": self.bf16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }


SETTINGS = {
    "stage 3": Setting(stage=3, freeze=True),
    "stage 3 bf16": Setting(stage=3, bf16=True, offload=True),
    "stage 2": Setting(stage=2, freeze=True, mtp=True),
    "stage 1": Setting(stage=1, freeze=True),
    "stage 1 bf16": Setting(stage=1, bf16=True),
    "stage 0": Setting(stage=0),
}


def build(setting: Setting, experts_per_shard: int = EXPERTS_PER_SHARD) -> StandIn:
    import deepspeed
    import torch.distributed as dist

    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    shapes = our_shapes(CONFIG, experts_per_shard, mtp=setting.mtp)
    if setting.stage < 3:
        model = StandIn(shapes)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16() if setting.bf16 else parameter.data
        return model
    with deepspeed.zero.Init(config_dict_or_path=setting.deepspeed_config()):
        return StandIn(shapes)


def keep_buffers_in_fp32(model: nn.Module) -> None:
    """zero.Init under bf16 makes every tensor bf16, buffers too."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.float())


def load_partitions(directory: Path, setting: Setting, experts_per_shard: int = EXPERTS_PER_SHARD) -> dict[str, Any]:
    """Loads a stand-in and compares what is gathered with the files' tensors, dequantised block by block."""
    import deepspeed
    import torch.distributed as dist

    model = build(setting, experts_per_shard)
    keep_buffers_in_fp32(model)
    named: dict[str, Any] = dict(model.named_parameters())
    for parameter in named.values():
        getattr(parameter, "ds_tensor", parameter.data).fill_(torch.nan)  # so that whatever is not written shows
    source = HFDirectorySource(directory)
    load(model, source, num_hidden_layers=LAYERS, progress=False)

    expected = stacked(dequantised(stored(directory)), experts_per_shard)
    wrong = [name for name, buffer in model.named_buffers() if not torch.equal(buffer.cpu(), expected[name])]
    padding = 0
    for name, parameter in named.items():
        if setting.stage < 3:
            if not torch.equal(parameter.data.cpu(), expected[name].to(parameter.dtype)):
                wrong.append(name)
            continue
        start = dist.get_rank() * parameter.ds_tensor.numel()
        kept = max(0, min(parameter.ds_tensor.numel(), parameter.ds_numel - start))
        padding += parameter.ds_tensor.numel() - kept
        if parameter.ds_tensor[kept:].any():
            wrong.append(f"padding of {name}")
        with deepspeed.zero.GatheredParameters(parameter):
            if not torch.equal(parameter.data.cpu(), expected[name].to(parameter.dtype)):
                wrong.append(name)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return {"wrong": wrong, "padding": padding, "bytes": source.bytes_read, "buffers": buffers}


def refuse_rounded_buffers(directory: Path) -> str:
    """Loads into a model whose correction bias zero.Init has made bf16; the error's text."""
    model = build(Setting(stage=3, bf16=True))
    try:
        load(model, HFDirectorySource(directory), num_hidden_layers=LAYERS, progress=False)
    except ValueError as error:
        return str(error)
    return ""


class Wrapper(nn.Module):
    """Holds the model as the LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        total: Tensor = self.model()
        return total


def live_export(folder: Path, label: str, dtype: str) -> Path:
    """Where `save_checkpoints` exports from the running engine."""
    return folder / "live" / label / dtype


def save_checkpoints(directory: Path, folder: Path, settings: dict[str, Setting]) -> dict[str, dict[str, Any]]:
    """Loads, trains a step and saves with each setting; returns masters and moments as DeepSpeed gathers them.

    Beside each checkpoint it exports from the running engine, in small chunks. Every third parameter is gathered: a
    wrong place would shift all that follow it.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from src.strategies.live_partitions import export_live
    from src.weights import output

    whole = output.chunks
    output.chunks = lambda start, stop, step=5000: whole(start, stop, step)  # several rounds for a tensor
    output.CHUNK = 1
    device = torch.device(get_accelerator().current_device_name())
    run_files = {"files": {}, "model_directory": str(directory), "tokenizer_directory": str(directory)}
    gathered: dict[str, dict[str, Any]] = {}
    for label, setting in settings.items():
        model = build(setting)
        keep_buffers_in_fp32(model)
        load(model, HFDirectorySource(directory), num_hidden_layers=LAYERS, progress=False)
        named = dict(model.named_parameters())
        for name in FROZEN if setting.freeze else ():
            named[name].requires_grad_(False)
        trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        groups = [
            {"params": [p for name, p in trained.items() if not name.endswith("norm.weight")], "weight_decay": 0.1},
            {"params": [p for name, p in trained.items() if name.endswith("norm.weight")], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        engine, *_ = deepspeed.initialize(
            model=Wrapper(model), config=setting.deepspeed_config(), optimizer=optimizer, dist_init_required=False
        )
        engine.backward(engine())
        engine.step()
        if setting.stage in (1, 2):
            # DeepSpeed 0.19.8 links moments to parameters after the first group's step, when the second has none yet.
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        engine.save_checkpoint(str(folder / label), tag="checkpoint", client_state={"epoch": 0})
        for dtype in DTYPES:
            export_live(engine, model, device, run_files, live_export(folder, label, dtype), dtype, "100KB")
        if setting.stage > 0:
            gathered[label] = {
                name: {
                    "fp32": safe_get_full_fp32_param(parameter),
                    "exp_avg": safe_get_full_optimizer_state(parameter, "exp_avg"),
                    "exp_avg_sq": safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
                }
                for name, parameter in list(trained.items())[::3]
            }
        engine.destroy()
    return gathered
