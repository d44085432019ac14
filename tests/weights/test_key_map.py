"""Names and shapes against transformers and the published checkpoint; ranges against stacking spelled out."""

import math

import pytest
import torch

from src.weights.fp8 import is_quantised, scale_shape
from src.weights.key_map import PerExpert, Piece, StackedExperts, hf_pieces, hf_shapes
from src.weights.side_files import architecture
from tests.checkpoints.tiny import CONFIG, our_shapes, ranges, stacked

# The architecture's sizes in the config.json of DeepSeek-V3.
DEEPSEEK_V3 = {
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


class InMemory:
    """A WeightSource of tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name].reshape(-1)[start:stop]


def random_weights(mtp: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in hf_shapes(architecture(CONFIG), mtp=mtp).items()}


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"attention_bias": True}, {"n_shared_experts": 2}])
def test_names_and_shapes_are_those_of_transformers(changes: dict[str, object]) -> None:
    from transformers import DeepseekV3ForCausalLM

    config = architecture(CONFIG | changes)
    with torch.device("meta"):
        expected = DeepseekV3ForCausalLM(config).state_dict()
    shapes = {name: torch.empty(shape, device="meta") for name, shape in hf_shapes(config, mtp=False).items()}
    ours = stacked(shapes, CONFIG["n_routed_experts"])  # transformers' own module stacks all experts of a layer
    assert {name.replace("experts.0.", "experts."): t.shape for name, t in ours.items()} == {
        name: t.shape for name, t in expected.items()
    }


def test_names_and_shapes_are_those_of_the_published_checkpoint() -> None:
    config = architecture(DEEPSEEK_V3)
    shapes = hf_shapes(config, mtp=True)
    scales = [scale_shape(shape) for name, shape in shapes.items() if is_quantised(name)]
    # deepseek-ai/DeepSeek-V3: tensors in model.safetensors.index.json, and elements on the model's page.
    assert len(shapes) + len(scales) == 91_991
    assert sum(map(math.prod, [*shapes.values(), *scales])) == 684_531_386_000
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert sum(map(math.prod, hf_shapes(config, mtp=False).values())) == 671_026_419_200


def test_pieces_are_in_order_of_experts_gate_before_up() -> None:
    assert hf_pieces("model.layers.4.mlp.experts.3.gate_up_proj", (2, 10, 7)) == [
        Piece("model.layers.4.mlp.experts.6.gate_proj.weight", (5, 7)),
        Piece("model.layers.4.mlp.experts.6.up_proj.weight", (5, 7)),
        Piece("model.layers.4.mlp.experts.7.gate_proj.weight", (5, 7)),
        Piece("model.layers.4.mlp.experts.7.up_proj.weight", (5, 7)),
    ]


@pytest.mark.parametrize("experts_per_shard", [1, 2, 8])
def test_any_range_of_ours_is_the_stacked_tensors(experts_per_shard: int) -> None:
    weights = random_weights(mtp=True)
    expected = stacked(weights, experts_per_shard)
    view = StackedExperts(InMemory(weights), our_shapes(CONFIG, experts_per_shard, mtp=True))
    for name in view.names():
        for start, stop in ranges(view.shape(name)):
            assert torch.equal(view.read(name, start, stop), expected[name].reshape(-1)[start:stop]), name


def test_any_range_of_theirs_is_the_expert() -> None:
    weights = random_weights()
    view = PerExpert(InMemory(stacked(weights, 4)))
    assert set(view.names()) == set(weights)
    for name, tensor in weights.items():
        assert view.shape(name) == tuple(tensor.shape)
        for start, stop in ranges(tensor.shape):
            assert torch.equal(view.read(name, start, stop), tensor.reshape(-1)[start:stop]), name


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.tokens", "embed_tokens.weight"]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is no parameter of DeepSeek-V3"):
        hf_pieces(name, (2, 2))


def test_experts_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has shape \(2, 3, 4\); stacked experts are gate_up_proj \[e, 2I, H\]"):
        hf_pieces("model.layers.1.mlp.experts.0.gate_up_proj", (2, 3, 4))
