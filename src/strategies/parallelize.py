"""Everything that is parallel about the model, applied from outside in one visible order."""

import contextlib
from functools import partial

from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from torch.utils.checkpoint import checkpoint

from src.errors import UserError
from src.models.deepseek_v3 import DeepseekV3ForCausalLM, ExpertParallelGroup, Experts, ExpertShard
from src.models.deepseek_v3.recompute import recompute

from .parallel_dims import ParallelDims
from .zero_limits import zero3_limits


def check_heads(model: DeepseekV3ForCausalLM, dims: ParallelDims) -> None:
    """Raises ValueError where the attention heads do not divide over the SP group."""
    heads = model.config.num_attention_heads
    if heads % dims.sp:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0 and dims.world_size % n == 0]
        raise UserError(
            f"num_attention_heads {heads} is not a multiple of sequence_parallel_size {dims.sp} "
            f"(WORLD_SIZE {dims.world_size} = dp {dims.dp} x sp {dims.sp}): each SP rank attends with its own heads. "
            f"It may be {', '.join(map(str, divisors))}."
        )


def share_experts(model: DeepseekV3ForCausalLM, dims: ParallelDims, group: ExpertParallelGroup) -> None:
    """Leaves to this rank its part of each layer's experts.

    Raises:
        ValueError: they do not divide over the EP group, or some ranks would train a part of them that others freeze.
    """
    dims.check_experts(model.config.n_routed_experts)
    for prefix, experts in model.named_modules():
        if not isinstance(experts, Experts):
            continue
        assert len(experts) % dims.ep == 0, "experts_per_shard is chosen by `shard_size`"
        trained = {name: parameter.requires_grad for name, parameter in experts.named_parameters()}
        part = len(experts) // dims.ep
        for name in trained:
            shard, kind = name.split(".")
            if trained[name] != trained[twin := f"{int(shard) % part}.{kind}"]:
                raise UserError(
                    f"freeze matches one of {prefix}.{twin} and {prefix}.{name} and not the other, which are the same "
                    f"part of two GPUs (expert_parallel_size {dims.ep}): freeze all experts of a layer, or none."
                )
    model.set_expert_parallel(group)


def apply_activation_checkpointing(model: DeepseekV3ForCausalLM) -> None:
    """A layer keeps its input alone and runs again in the backward pass; its experts know, and do not."""
    model.run_layer = partial(
        checkpoint,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), recompute()),
        preserve_rng_state=False,  # nothing in the model is random
    )


def apply_zero_leaves(model: nn.Module) -> None:
    """ZeRO-3 gathers an expert shard as one, and expects it to be called whole."""
    set_z3_leaf_modules(model, [ExpertShard])


def zero3_settings(model: nn.Module) -> dict[str, int]:
    """`zero3_limits` of the model's largest expert shard, or without experts of its largest parameter."""
    shards = [sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, ExpertShard)]
    return zero3_limits(max(shards) if shards else max(p.numel() for p in model.parameters()))
