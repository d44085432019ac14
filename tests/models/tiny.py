"""Tiny configs of the architecture with everything on, oracles of them, and our model with the same weights.

Written out as config.json fields: no oracle's defaults, no file of a real model.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3ForCausalLM as OracleModel

try:
    from transformers.modeling_layers import MtpModel
except ImportError:
    MtpModel = None

from src.models.deepseek_v3 import DeepseekV3ForCausalLM, config_from_dict
from src.models.loss import IGNORE_INDEX

needs_mtp_oracle = pytest.mark.skipif(MtpModel is None, reason="this transformers has no MtpModel to compare with")

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
    "rms_norm_eps": 1e-5,  # not 1e-6, so that the latent norms, which ignore it, are seen to
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 0,
}

# Moonlight-16B: no query compression, one group, no YaRN, two shared experts.
MOONLIGHT = DEEPSEEK_V3 | {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "rope_theta": 50000.0,
    "rope_scaling": None,
    "routed_scaling_factor": 2.446,
    "attention_bias": False,
}

# Kimi-K2: its own model_type, one group, twelve experts, two heads, another YaRN.
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50000.0,
    "rope_scaling": YARN | {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "norm_topk_prob": False,
    "attention_bias": False,
}

CONFIGS = {"deepseek_v3": DEEPSEEK_V3, "moonlight": MOONLIGHT, "kimi_k2": KIMI_K2}


def oracle(fields: dict[str, Any], seed: int = 0) -> OracleModel:
    """transformers' model in fp32 with random weights: norms off one, router biases of both signs, biases non-zero."""
    torch.manual_seed(seed)
    config = config_from_dict(fields)
    config._attn_implementation = "eager"
    model = OracleModel(config).float()
    _randomise(model)
    return model.eval()


@torch.no_grad()
def _randomise(module: torch.nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if "norm" in name:
            tensor.add_(0.2 * torch.randn_like(tensor))
        elif "e_score_correction_bias" in name:
            tensor.copy_(0.2 * torch.randn_like(tensor))
        elif "inv_freq" not in name:
            tensor.copy_(0.1 * torch.randn_like(tensor))


def mtp_oracle(main: OracleModel, seed: int = 1) -> Any:
    """transformers' multi-token prediction over `main`, one block with random weights as `oracle`'s, or no MtpModel."""
    torch.manual_seed(seed)
    mtp = MtpModel(main, 1)
    _randomise(mtp.layers)
    return mtp.float().eval()


def oracle_tensors(main: OracleModel, mtp: Any = None) -> dict[str, Tensor]:
    """All parameters and router biases under our names, each layer's experts as one tensor."""
    tensors = dict([*main.named_parameters(), *main.named_buffers()])
    if mtp is not None:
        (layer,), prefix = mtp.layers, f"model.layers.{main.config.num_hidden_layers}."
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            tensors[prefix + name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm", 1)] = tensor
    return tensors


def hf_state_dict(model: OracleModel, mtp: Any = None) -> dict[str, Tensor]:
    """Its weights under the published names, one tensor an expert."""
    state = {}
    for name, tensor in oracle_tensors(model, mtp).items():
        if "inv_freq" in name:
            continue
        if name.endswith("mlp.experts.gate_up_proj"):
            for index, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                base = name.removesuffix("gate_up_proj")
                state[f"{base}{index}.gate_proj.weight"], state[f"{base}{index}.up_proj.weight"] = gate, up
        elif name.endswith("mlp.experts.down_proj"):
            for index, expert in enumerate(tensor):
                state[f"{name.removesuffix('down_proj')}{index}.down_proj.weight"] = expert
        else:
            state[name] = tensor
    return state


def ours(
    fields: dict[str, Any], source: OracleModel, experts_per_shard: int | None = None, mtp: Any = None
) -> DeepseekV3ForCausalLM:
    """Our model with the oracles' weights, stacked here by hand, apart from the loader that the project ships."""
    model = DeepseekV3ForCausalLM(config_from_dict(fields), experts_per_shard, with_mtp=mtp is not None)
    state = oracle_tensors(source, mtp)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            base, found, rest = name.partition(".mlp.experts.")
            if found:
                shard, kind = rest.split(".")
                first = int(shard) * len(tensor)
                tensor.copy_(state[f"{base}.mlp.experts.{kind}"][first : first + len(tensor)])
            else:
                tensor.copy_(state[name])
    return model


Sample = tuple[Tensor, Tensor]  # tokens int64 [n], and whether each is a target, bool [n]


def samples(vocab: Iterable[range], lengths: Iterable[int], seed: int = 1) -> list[Sample]:
    """Documents of random tokens, each of its own part of the vocabulary, about a third of them no targets."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(part.start, part.stop, (length,), generator=generator),
            torch.rand(length, generator=generator) > 0.3,
        )
        for part, length in zip(vocab, lengths, strict=True)
    ]


def packed(documents: list[Sample], padding: int = 0) -> dict[str, Any]:
    """What our model's forward takes, of documents in one row and some tokens of padding, shifted here by hand."""

    def ahead(values: list[Tensor], by: int, fill: int) -> Tensor:
        shifted = [F.pad(x[by:], (0, min(by, len(x))), value=fill) for x in values]
        return F.pad(torch.cat(shifted), (0, padding), value=fill)

    ids = [x for x, _ in documents]
    targets = [x.where(wanted, IGNORE_INDEX) for x, wanted in documents]
    lengths = [len(x) for x in ids] + [padding] * (padding > 0)
    numbers = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(x) for x in ids]))
    return {
        "input_ids": F.pad(torch.cat(ids), (0, padding), value=1),
        "labels": ahead(targets, 1, IGNORE_INDEX),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": max(lengths),
        "document_ids": F.pad(numbers, (0, padding), value=-1),
        "mtp_input_ids": ahead(ids, 1, 0),
        "mtp_labels": ahead(targets, 2, IGNORE_INDEX),
    }


def oracle_losses(main: OracleModel, mtp: Any, documents: list[Sample]) -> tuple[Tensor, Tensor]:
    """Sums of the next token's and of the multi-token prediction's cross-entropy, each document alone in its pass.

    The last token of a document has no next one, and gets token 0; no target depends on it.
    """
    cross_entropy, mtp_cross_entropy = torch.zeros(()), torch.zeros(())
    for ids, wanted in documents:
        places, targets = torch.arange(len(ids))[None], ids.where(wanted, IGNORE_INDEX)
        hidden = main.model(ids[None]).last_hidden_state  # after the final norm
        cross_entropy = cross_entropy + F.cross_entropy(main.lm_head(hidden)[0, :-1], targets[1:], reduction="sum")
        if mtp is not None:
            predicted = mtp.forward_layer(0, hidden, places, None, input_ids=F.pad(ids[1:], (0, 1))[None])
            logits = mtp.shared_head(predicted)[0, : max(len(ids) - 2, 0)]
            mtp_cross_entropy = mtp_cross_entropy + F.cross_entropy(logits, targets[2:], reduction="sum")
    return cross_entropy, mtp_cross_entropy


def stacked_gradients(model: DeepseekV3ForCausalLM) -> dict[str, Tensor]:
    """Our gradients under transformers' module names, shards concatenated."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        base, found, rest = name.partition(".mlp.experts.")
        if found:
            whole = f"{base}.mlp.experts.{rest.split('.')[1]}"
            before = [gradients[whole]] if whole in gradients else []
            gradients[whole] = torch.cat([*before, parameter.grad])
        else:
            gradients[name] = parameter.grad
    return gradients


def relative(ours: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((ours - reference).detach().norm() / reference.detach().norm())
