"""What the parts of the model weigh, from the numbers of its config.json; nothing is built and no torch needed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb
from pathlib import Path
from typing import Any

from src.errors import UserError

from .config_json import read_fields
from .freezing import frozen

# bf16 bytes of a shard of experts at most. Two or three shards are in memory at once, with the gradients of one. A
# visit of a shard costs the host some 5 ms whatever its size, and the network moves these bytes between 256 GPUs in
# 8 ms: smaller shards would let a step wait for the host (Moonlight in shards of 0.14 GB, benchmarks/RESULTS.md).
SHARD_BYTES = 3_000_000_000


@dataclass(frozen=True)
class Sizes:
    """Widths and counts under config.json's names; parameters are counted in elements.

    mtp: whether the multi-token-prediction block is trained, which num_hidden_layers does not count.
    """

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    n_routed_experts: int
    moe_intermediate_size: int
    n_shared_experts: int
    num_experts_per_tok: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    experts_per_shard: int
    mtp: bool
    attention_bias: bool = False
    n_group: int = 1
    topk_group: int = 1

    @property
    def shards(self) -> int:
        return self.n_routed_experts // self.experts_per_shard

    @property
    def shard(self) -> dict[str, int]:
        """One shard of experts, as ZeRO-3 gathers it."""
        width = self.experts_per_shard * self.moe_intermediate_size * self.hidden_size
        return {"gate_up_proj": 2 * width, "down_proj": width}

    @property
    def latents(self) -> int:
        """Elements a token that SP gathers: the query's latent, the key-value latent and the rotary key."""
        return (self.q_lora_rank or self.hidden_size) + self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def embedding(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def layers(self) -> int:
        """With the multi-token prediction's."""
        return self.num_hidden_layers + self.mtp

    def dense(self, layer: int) -> bool:
        return layer < self.first_k_dense_replace

    @cached_property
    def parameters(self) -> int:
        """Of the model that is built: without the multi-token prediction where it is not trained."""
        return sum(size for _, size in named_parameters(self))


def reach(config: Sizes, ep: int) -> float:
    """Ranks of an EP group that have one of a token's experts, all choices as likely."""
    groups = max(1, config.n_group // ep)  # of experts, with a part on a rank
    part = config.n_routed_experts // max(ep, config.n_group)
    chosen, top_k = config.n_routed_experts * config.topk_group // config.n_group, config.num_experts_per_tok
    missed = 0.0
    for n in range(min(groups, config.topk_group) + 1):  # of a rank's groups among the chosen
        likely = comb(groups, n) * comb(config.n_group - groups, config.topk_group - n)
        missed += (
            likely / comb(config.n_group, config.topk_group) * comb(chosen - n * part, top_k) / comb(chosen, top_k)
        )
    return ep * (1 - missed)


def most_received(config: Sizes, ep: int) -> float:
    """Tokens that a rank has of its EP group's at once, for each token of its own: half as many again as even choices
    send it, or all."""
    return min(1.5 * reach(config, ep), ep)


def attention_weights(config: Sizes) -> dict[str, int]:
    """Elements of attention's projections in the order of the forward pass, the output's last."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    queries = {"q_proj": hidden * query} if rank is None else {"q_a_proj": hidden * rank, "q_b_proj": rank * query}
    return queries | {
        "kv_a_proj_with_mqa": hidden * (config.kv_lora_rank + config.qk_rope_head_dim),
        "kv_b_proj": config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim),
        "o_proj": heads * config.v_head_dim * hidden,
    }


def mlp_weights(config: Sizes, dense: bool) -> dict[str, int]:
    """Elements of the dense MLP, or of router and shared experts."""
    width = config.intermediate_size if dense else config.moe_intermediate_size * config.n_shared_experts
    names = [f"{'' if dense else 'shared_experts.'}{kind}_proj" for kind in ("gate", "up", "down")]
    router = {} if dense else {"gate": config.hidden_size * config.n_routed_experts}
    return router | dict.fromkeys(names, config.hidden_size * width)


def small_parameters(config: Sizes) -> dict[str, int]:
    """Elements of a layer's norms and biases, which ZeRO-3 keeps whole on every rank."""
    hidden, rank, kv_rank = config.hidden_size, config.q_lora_rank, config.kv_lora_rank
    norms = {} if rank is None else {"self_attn.q_a_layernorm.weight": rank}
    norms |= {"self_attn.kv_a_layernorm.weight": kv_rank}
    norms |= {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}
    if not config.attention_bias:
        return norms
    biases = {} if rank is None else {"self_attn.q_a_proj.bias": rank}
    latent = kv_rank + config.qk_rope_head_dim
    return norms | biases | {"self_attn.kv_a_proj_with_mqa.bias": latent, "self_attn.o_proj.bias": hidden}


def named_parameters(config: Sizes) -> Iterator[tuple[str, int]]:
    """The model's parameter names and their elements."""
    yield "model.embed_tokens.weight", config.embedding
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        for name, size in attention_weights(config).items():
            yield f"{layer}.self_attn.{name}.weight", size
        for name, size in small_parameters(config).items():
            yield f"{layer}.{name}", size
        for name, size in mlp_weights(config, config.dense(i)).items():
            yield f"{layer}.mlp.{name}.weight", size
        for shard in range(0 if config.dense(i) else config.shards):
            for name, size in config.shard.items():
                yield f"{layer}.mlp.experts.{shard}.{name}", size
        if i == config.num_hidden_layers:
            yield f"{layer}.eh_proj.weight", 2 * config.hidden_size**2
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{layer}.{name}.weight", config.hidden_size
    yield "model.norm.weight", config.hidden_size
    yield "lm_head.weight", config.embedding


def trained_part(config: Sizes, freeze: Sequence[str]) -> float:
    """The part of the parameters that no pattern of `freeze` names. Raises ValueError as `frozen`."""
    sizes = dict(named_parameters(config))
    still = frozen(sizes, freeze, config.experts_per_shard)
    return 1 - sum(sizes[name] for name in still) / config.parameters


def layer_input_bytes(config: Sizes, param_bytes: int) -> int:
    """A token's, that a layer's recomputation starts from."""
    return config.hidden_size * param_bytes


def attention_output_bytes(config: Sizes, param_bytes: int) -> int:
    """A token's: the kernel's output and its fp32 log-sums, and the output projection's result."""
    heads = config.num_attention_heads
    return (heads * config.v_head_dim + config.hidden_size) * param_bytes + 4 * heads


def auto_experts_per_shard(experts: int, hidden_size: int, moe_intermediate_size: int) -> int:
    """As many experts as SHARD_BYTES hold and divide a layer's: 32 of DeepSeek-V3's 256, all 64 of Moonlight's."""
    most = max(1, SHARD_BYTES // (2 * 3 * hidden_size * moe_intermediate_size))
    return max(size for size in range(1, min(most, experts) + 1) if experts % size == 0)


def shard_size(
    experts: int, hidden_size: int, moe_intermediate_size: int, asked: int | None, expert_parallel_size: int = 1
) -> int:
    """Experts of a shard: what was asked for, or chosen where that is None; the model and the planner call it.

    Raises:
        ValueError: it does not divide the experts of a layer that a GPU has.
    """
    if expert_parallel_size > 1 and experts % expert_parallel_size == 0:  # otherwise refused with the sizes that work
        layer, experts = experts, experts // expert_parallel_size
        of = f"of a GPU ({layer} n_routed_experts / expert_parallel_size {expert_parallel_size})"
    else:
        of = "of a layer (n_routed_experts)"
    chosen = auto_experts_per_shard(experts, hidden_size, moe_intermediate_size)
    size = chosen if asked is None else asked
    if size < 1 or experts % size:
        raise UserError(f"experts_per_shard {size} does not divide the {experts} experts {of}; 'auto' takes {chosen}.")
    return size


def read_sizes(directory: str | Path, experts_per_shard: int | None, mtp: bool, expert_parallel_size: int = 1) -> Sizes:
    """Of the config.json in `directory`; experts_per_shard as in `shard_size`; mtp asks for the block.

    Raises:
        ValueError: as `read_fields` and `shard_size`.
    """
    return sizes_of(read_fields(directory), experts_per_shard, mtp, expert_parallel_size)


def sizes_of(
    fields: Mapping[str, Any], experts_per_shard: int | None, mtp: bool, expert_parallel_size: int = 1
) -> Sizes:
    given = {name: fields[name] for name in Sizes.__dataclass_fields__ if name in fields}
    experts, hidden, width = (fields[name] for name in ("n_routed_experts", "hidden_size", "moe_intermediate_size"))
    given["experts_per_shard"] = shard_size(experts, hidden, width, experts_per_shard, expert_parallel_size)
    given["mtp"] = mtp and bool(fields.get("num_nextn_predict_layers"))
    return Sizes(**given)
