"""Tiny models for the tests of weights: transformers' as the oracle, and a stand-in with our names and shapes."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from src.checkpoints.manifest import MANIFEST, FileRecord, dump_manifest
from src.disk.durable import seal
from src.weights.key_map import hf_shapes
from src.weights.side_files import architecture

# As published, without what transformers derives. Widths leave FP8 blocks at the edges and padding in partitions: of 5
# elements on four processes the last has none.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 160,
    "initializer_range": 0.02,
    "intermediate_size": 272,
    "kv_lora_rank": 31,
    "max_position_embeddings": 256,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 144,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 5,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 16,
    "vocab_size": 320,
}
LAYERS = CONFIG["num_hidden_layers"]


def tokenizer_json() -> str:
    """A tokenizer of 256 bytes."""
    tokenizer = Tokenizer(
        models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer.to_str()


SIDE_FILES = {
    "generation_config.json": '{"eos_token_id": 1}',
    "tokenizer.json": tokenizer_json(),
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ bos }}",
}


def oracle(config: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with every value, norms and correction bias included, drawn at random."""
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(architecture(config)).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                tensor.copy_(torch.randn_like(tensor) * 0.05 + name.endswith("norm.weight"))
    return model.to(dtype)


def save_oracle(directory: Path, model: Any, config: dict[str, Any] = CONFIG, max_shard_size: str = "1MB") -> None:
    """As a published directory: transformers' weights, our config.json, tokenizer files."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    (directory / "config.json").write_text(json.dumps(config))
    for name, text in SIDE_FILES.items():
        (directory / name).write_text(text)


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, read whole by the safetensors library."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def save_mtp(directory: Path, dtype: torch.dtype, config: dict[str, Any] = CONFIG) -> dict[str, Tensor]:
    """Adds the multi-token-prediction block's tensors to a directory, as one more shard."""
    shapes, main = hf_shapes(architecture(config), mtp=True), hf_shapes(architecture(config), mtp=False)
    torch.manual_seed(1)
    tensors = {
        name: torch.randn(shape).to(torch.float32 if name.endswith("bias") else dtype)
        for name, shape in shapes.items()
        if name not in main
    }
    save_file(tensors, directory / "mtp.safetensors")
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "mtp.safetensors")
    index_file.write_text(json.dumps(index))
    return tensors


def dequantise_whole(values: Tensor, scale: Tensor) -> Tensor:
    """[R, C] e4m3 and its scales, block by block."""
    weight = values.float()
    for row, column in torch.cartesian_prod(*map(torch.arange, scale.shape)).tolist():
        weight[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] *= scale[row, column]
    return weight


def dequantised(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A directory's tensors with those in FP8 multiplied by their scales, which are left out."""
    return {
        name: dequantise_whole(tensor, weights[f"{name}_scale_inv"]) if f"{name}_scale_inv" in weights else tensor
        for name, tensor in weights.items()
        if not name.endswith("_scale_inv")
    }


def stacked(weights: dict[str, Tensor], experts_per_shard: int, config: dict[str, Any] = CONFIG) -> dict[str, Tensor]:
    """Hugging Face tensors as ours: experts stacked, spelled out independently of the code under test."""
    ours = {name: tensor for name, tensor in weights.items() if ".mlp.experts." not in name}
    for layer in range(config["first_k_dense_replace"], LAYERS + 1):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.up_proj.weight" not in weights:
            continue
        for shard in range(config["n_routed_experts"] // experts_per_shard):
            experts = range(shard * experts_per_shard, (shard + 1) * experts_per_shard)
            gate_up = [
                torch.cat([weights[f"{prefix}.{expert}.{kind}_proj.weight"] for kind in ("gate", "up")])
                for expert in experts
            ]
            ours[f"{prefix}.{shard}.gate_up_proj"] = torch.stack(gate_up)
            ours[f"{prefix}.{shard}.down_proj"] = torch.stack(
                [weights[f"{prefix}.{expert}.down_proj.weight"] for expert in experts]
            )
    return ours


class StandIn(nn.Module):
    """A module whose parameters have the given names and shapes, and whose output depends on all of them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        below: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            head, _, rest = name.partition(".")
            if rest:
                below.setdefault(head, {})[rest] = shape
            elif head == "e_score_correction_bias":
                self.register_buffer(head, torch.zeros(shape, dtype=torch.float32))
            else:
                setattr(self, head, nn.Parameter(torch.full(shape, torch.nan)))
        for name, inner in below.items():
            self.add_module(name, StandIn(inner))

    def forward(self) -> Tensor:
        total = torch.zeros(())
        for parameter in self.parameters(recurse=False):
            total = total + parameter.float().square().mean()
        for child in self.children():
            total = total + child()
        return total


def our_shapes(config: dict[str, Any], experts_per_shard: int, *, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of a model; the MTP block without its copies of embedding and head."""
    whole = {name: torch.empty(s, device="meta") for name, s in hf_shapes(architecture(config), mtp=mtp).items()}
    copies = (f"model.layers.{LAYERS}.embed_tokens.weight", f"model.layers.{LAYERS}.shared_head.head.weight")
    ours = stacked(whole, experts_per_shard, config)
    return {name: tuple(tensor.shape) for name, tensor in ours.items() if name not in copies}


def ranges(shape: tuple[int, ...], count: int = 4) -> list[tuple[int, int]]:
    """The whole tensor, nothing, and random ranges of it."""
    numel = math.prod(shape)
    ends = torch.randint(0, numel + 1, (count, 2), generator=torch.Generator().manual_seed(numel)).sort(dim=1)[0]
    return [(0, numel), (numel // 2, numel // 2), *((int(start), int(stop)) for start, stop in ends)]


def list_files(checkpoint: Path, world_size: int = 2) -> None:
    """Writes the manifest of a checkpoint as it stands; rank r's files are those with its number in their names."""
    records = {}
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            found = re.search(r"pp_rank_(\d+)_", file.name)
            records[str(file.relative_to(checkpoint))] = FileRecord(*seal(file), int(found[1]) if found else 0)
    (checkpoint / MANIFEST).write_text(dump_manifest(records, world_size))
