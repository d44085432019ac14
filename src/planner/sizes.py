"""What the parts of a DeepSeek-V3 weigh, from the numbers of its config.json; nothing is built."""

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Widths and counts under the field's names; parameters are counted in elements.

    layers: without the multi-token-prediction block; dense: how many of them have no experts, from the first on.
    mtp: whether the block is trained.
    """

    hidden: int
    vocab: int
    layers: int
    dense: int
    dense_width: int
    experts: int
    expert_width: int
    shared: int
    top_k: int
    heads: int
    query_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int
    experts_per_shard: int
    mtp: bool

    @property
    def shards(self) -> int:
        return self.experts // self.experts_per_shard

    @property
    def shard(self) -> list[int]:
        """gate_up_proj and down_proj of one shard, as ZeRO-3 gathers them."""
        width = self.experts_per_shard * self.expert_width * self.hidden
        return [2 * width, width]

    @property
    def latents(self) -> int:
        """Elements a token that SP gathers: the query's latent, the key-value latent and the rotary key."""
        return (self.query_rank or self.hidden) + self.kv_rank + self.rope

    @property
    def attention(self) -> list[int]:
        """The projections in the order of the forward pass, the output's last."""
        query = self.heads * (self.nope + self.rope)
        down = [] if self.query_rank is None else [self.hidden * self.query_rank]
        up = (self.query_rank or self.hidden) * query
        return [
            *down,
            up,
            self.hidden * (self.kv_rank + self.rope),
            self.kv_rank * self.heads * (self.nope + self.value),
            self.heads * self.value * self.hidden,
        ]

    @property
    def norms(self) -> int:
        """Of a layer; ZeRO-3 keeps such small parameters whole."""
        return 2 * self.hidden + (self.query_rank or 0) + self.kv_rank

    def mlp(self, dense: bool) -> list[int]:
        """Dense MLP, or router and shared experts."""
        if dense:
            return 3 * [self.hidden * self.dense_width]
        return [self.hidden * self.experts, *3 * [self.hidden * self.expert_width * self.shared]]

    def layer(self, dense: bool) -> int:
        return sum(self.attention) + self.norms + sum(self.mlp(dense)) + (0 if dense else self.shards * sum(self.shard))

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def mtp_parameters(self) -> int:
        """Of the block without its copies of embedding and head."""
        return self.layer(False) + 2 * self.hidden**2 + 3 * self.hidden

    @property
    def parameters(self) -> int:
        """Of the model that is built: without the multi-token prediction where it is not trained."""
        layers = self.dense * self.layer(True) + (self.layers - self.dense) * self.layer(False)
        return layers + self.mtp * self.mtp_parameters + 2 * self.embedding + self.hidden


def named_parameters(s: Sizes) -> Iterator[tuple[str, int]]:
    """Our parameter names and their elements; a test compares them with the model's."""
    down = [] if s.query_rank is None else ["q_a_proj"]
    projections = [*down, "q_b_proj" if down else "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    yield "model.embed_tokens.weight", s.embedding
    for i in range(s.layers + s.mtp):
        layer, dense = f"model.layers.{i}", i < s.dense
        for name, size in zip(projections, s.attention, strict=True):
            yield f"{layer}.self_attn.{name}.weight", size
        if down:
            yield f"{layer}.self_attn.q_a_layernorm.weight", s.query_rank or 0
        yield f"{layer}.self_attn.kv_a_layernorm.weight", s.kv_rank
        yield f"{layer}.input_layernorm.weight", s.hidden
        yield f"{layer}.post_attention_layernorm.weight", s.hidden
        names = [f"{kind}_proj.weight" for kind in ("gate", "up", "down")]
        names = names if dense else ["gate.weight", *(f"shared_experts.{name}" for name in names)]
        for name, size in zip(names, s.mlp(dense), strict=True):
            yield f"{layer}.mlp.{name}", size
        for shard in range(0 if dense else s.shards):
            for name, size in zip(("gate_up_proj", "down_proj"), s.shard, strict=True):
                yield f"{layer}.mlp.experts.{shard}.{name}", size
        if i == s.layers:
            yield f"{layer}.eh_proj.weight", 2 * s.hidden**2
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{layer}.{name}.weight", s.hidden
    yield "model.norm.weight", s.hidden
    yield "lm_head.weight", s.embedding


def trained_part(sizes: Sizes, freeze: Sequence[str]) -> float:
    """The part of the parameters that no pattern of `freeze` names."""
    trained = sum(
        size
        for name, size in named_parameters(sizes)
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in freeze)
    )
    return trained / sizes.parameters


def read_sizes(directory: str | Path, experts_per_shard: int | None, mtp: bool) -> Sizes:
    """Of the config.json in `directory`; `experts_per_shard` None chooses as the model does.

    Raises:
        ValueError: there is none, it is no JSON object, it lacks a number, or experts_per_shard does not divide the
            experts.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; give the model's directory, or only its config.json, with --model.pretrained."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; copy it again from where the weights are.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no fields; take the config.json that came with the weights.")
    try:
        return sizes_of(fields, experts_per_shard, mtp)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]}; take the config.json that came with the weights.") from error


def sizes_of(fields: Mapping[str, Any], experts_per_shard: int | None, mtp: bool) -> Sizes:
    experts = fields["n_routed_experts"]
    if experts_per_shard is None:  # an eighth, as src/models/deepseek_v3/experts.py chooses; a test compares them
        experts_per_shard = max(n for n in range(1, max(1, experts // 8) + 1) if experts % n == 0)
    if experts_per_shard < 1 or experts % experts_per_shard:
        raise ValueError(f"experts_per_shard {experts_per_shard} does not divide the {experts} experts of a layer.")
    return Sizes(
        hidden=fields["hidden_size"],
        vocab=fields["vocab_size"],
        layers=fields["num_hidden_layers"],
        dense=min(fields["first_k_dense_replace"], fields["num_hidden_layers"]),
        dense_width=fields["intermediate_size"],
        experts=experts,
        expert_width=fields["moe_intermediate_size"],
        shared=fields["n_shared_experts"],
        top_k=fields["num_experts_per_tok"],
        heads=fields["num_attention_heads"],
        query_rank=fields["q_lora_rank"],
        kv_rank=fields["kv_lora_rank"],
        nope=fields["qk_nope_head_dim"],
        rope=fields["qk_rope_head_dim"],
        value=fields["v_head_dim"],
        experts_per_shard=experts_per_shard,
        mtp=mtp and bool(fields.get("num_nextn_predict_layers")),
    )
