"""Maps our parameter names to Hugging Face's.

They differ only in the routed experts: we stack shards of e experts, Hugging Face has three tensors per expert.

    model.layers.3.mlp.experts.{s}.gate_up_proj [e, 2I, H] = for each expert s*e + j: gate_proj [I, H], up_proj [I, H]
    model.layers.3.mlp.experts.{s}.down_proj    [e, H, I]  = for each expert s*e + j: down_proj [H, I]

Flattened, each of ours is the concatenation of its pieces, so a contiguous range stays a few contiguous ranges.

H hidden_size, I moe_intermediate_size, E n_routed_experts, L num_hidden_layers, V vocab_size.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from src.weights.source import WeightSource

if TYPE_CHECKING:
    from transformers import DeepseekV3Config

_ATTENTION = r"(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight|(q_a|kv_a)_layernorm\.weight"
_ATTENTION_BIAS = r"(q_a_proj|kv_a_proj_with_mqa|o_proj)\.bias"
_UNCHANGED = re.compile(
    r"lm_head\.weight|model\.(embed_tokens|norm)\.weight|model\.layers\.\d+\.("
    rf"(input|post_attention)_layernorm\.weight|self_attn\.({_ATTENTION}|{_ATTENTION_BIAS})"
    r"|mlp\.(shared_experts\.)?(gate|up|down)_proj\.weight|mlp\.gate\.(weight|e_score_correction_bias)"
    r"|(enorm|hnorm|eh_proj|shared_head\.norm)\.weight)"
)
_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_up|down)_proj")


@dataclass(frozen=True)
class Piece:
    """A Hugging Face tensor that is a contiguous part of one of ours."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def hf_pieces(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """The Hugging Face tensors whose flattened concatenation is our flattened tensor `name` of `shape`.

    Raises ValueError for a name or a shape that is not of this architecture.
    """
    if _UNCHANGED.fullmatch(name):
        return [Piece(name, shape)]
    if not (match := _EXPERTS.fullmatch(name)):
        raise ValueError(
            f"{name!r} is no parameter of DeepSeek-V3: add it to {__name__}, or make the buffer non-persistent"
        )
    if len(shape) != 3 or (match[3] == "gate_up" and shape[1] % 2):
        raise ValueError(
            f"{name!r} has shape {shape}; stacked experts are gate_up_proj [e, 2I, H] and down_proj [e, H, I]"
        )
    experts, rows, columns = shape
    first = int(match[2]) * experts
    kinds = {"gate_proj": rows // 2, "up_proj": rows // 2} if match[3] == "gate_up" else {"down_proj": rows}
    return [
        Piece(f"{match[1]}.{expert}.{kind}.weight", (kind_rows, columns))
        for expert in range(first, first + experts)
        for kind, kind_rows in kinds.items()
    ]


def place_in_layer(name: str, numel: int) -> tuple[str, int]:
    """The place of our tensor `name`, of `numel` elements, if a layer's experts were not cut into shards.

    Returns the name of the whole and the index of the tensor's first element in it.
    """
    match = _EXPERTS.fullmatch(name)
    return (f"{match[1]}.{match[3]}_proj", int(match[2]) * numel) if match else (name, 0)


def mtp_layer(name: str, num_hidden_layers: int) -> bool:
    """Whether a tensor belongs to the multi-token-prediction block, whose layer ids follow the decoder's."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= num_hidden_layers


def mtp_copies(num_hidden_layers: int) -> dict[str, str]:
    """The MTP block's copies of shared tensors: copy's name -> original's name."""
    layer = f"model.layers.{num_hidden_layers}"
    return {
        f"{layer}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{layer}.shared_head.head.weight": "lm_head.weight",
    }


def hf_shapes(config: "DeepseekV3Config", *, mtp: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a published checkpoint of `config`, in the order in which we write them.

    With `mtp`, the block of layer id num_hidden_layers is included, and with it the copies of embedding and head.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    vocabulary = (config.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocabulary}
    for layer in range(layers):
        shapes |= _layer_shapes(config, layer)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": vocabulary}
    if mtp:
        prefix = f"model.layers.{layers}"
        shapes |= {f"{prefix}.embed_tokens.weight": vocabulary}
        shapes |= {f"{prefix}.{norm}.weight": (hidden,) for norm in ("enorm", "hnorm")}
        shapes |= {f"{prefix}.eh_proj.weight": (hidden, 2 * hidden)} | _layer_shapes(config, layers)
        shapes |= {f"{prefix}.shared_head.norm.weight": (hidden,), f"{prefix}.shared_head.head.weight": vocabulary}
    return shapes


def _layer_shapes(config: "DeepseekV3Config", layer: int) -> dict[str, tuple[int, ...]]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    latent = rank + config.qk_rope_head_dim

    shapes: dict[str, tuple[int, ...]] = {}
    attention = f"model.layers.{layer}.self_attn"
    if config.q_lora_rank is None:
        shapes[f"{attention}.q_proj.weight"] = (query, hidden)
    else:
        shapes[f"{attention}.q_a_proj.weight"] = (config.q_lora_rank, hidden)
        if config.attention_bias:
            shapes[f"{attention}.q_a_proj.bias"] = (config.q_lora_rank,)
        shapes[f"{attention}.q_a_layernorm.weight"] = (config.q_lora_rank,)
        shapes[f"{attention}.q_b_proj.weight"] = (query, config.q_lora_rank)
    shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (latent, hidden)
    if config.attention_bias:
        shapes[f"{attention}.kv_a_proj_with_mqa.bias"] = (latent,)
    shapes[f"{attention}.kv_a_layernorm.weight"] = (rank,)
    shapes[f"{attention}.kv_b_proj.weight"] = (heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    shapes[f"{attention}.o_proj.weight"] = (hidden, heads * config.v_head_dim)
    if config.attention_bias:
        shapes[f"{attention}.o_proj.bias"] = (hidden,)

    mlp = f"model.layers.{layer}.mlp"
    if layer < config.first_k_dense_replace:
        shapes |= _mlp_shapes(mlp, hidden, config.intermediate_size)
    else:
        inner, experts = config.moe_intermediate_size, config.n_routed_experts
        shapes |= {f"{mlp}.gate.weight": (experts, hidden), f"{mlp}.gate.e_score_correction_bias": (experts,)}
        for expert in range(experts):
            shapes |= _mlp_shapes(f"{mlp}.experts.{expert}", hidden, inner)
        shapes |= _mlp_shapes(f"{mlp}.shared_experts", hidden, inner * config.n_shared_experts)
    return shapes | {
        f"model.layers.{layer}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")
    }


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


class StackedExperts:
    """A WeightSource in our names over one in Hugging Face's: what loading reads.

    Args:
        source: in Hugging Face names.
        shapes: our names and shapes, which say how the experts are stacked.
    """

    def __init__(self, source: WeightSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._source = source
        self._shapes = dict(shapes)
        self.pieces = {name: hf_pieces(name, shape) for name, shape in self._shapes.items()}
        self._ends = {name: list(accumulate(piece.numel for piece in pieces)) for name, pieces in self.pieces.items()}

    def names(self) -> Iterable[str]:
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self.pieces[name][0].name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        pieces, ends, parts = self.pieces[name], self._ends[name], []
        index = bisect_right(ends, start)
        while start < stop:
            offset = ends[index] - pieces[index].numel
            end = min(stop, ends[index])
            parts.append(self._source.read(pieces[index].name, start - offset, end - offset))
            start, index = end, index + 1
        if not parts:
            return torch.empty(0, dtype=self.dtype(name))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class PerExpert:
    """A WeightSource in Hugging Face's names over one in ours: what exporting reads."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._places: dict[str, tuple[str, int, Piece]] = {}
        for name in source.names():
            offset = 0
            for piece in hf_pieces(name, source.shape(name)):
                self._places[piece.name] = (name, offset, piece)
                offset += piece.numel

    def names(self) -> Iterable[str]:
        return self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][2].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._places[name][0])

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        ours, offset, _ = self._places[name]
        return self._source.read(ours, offset + start, offset + stop)
