"""Tiny configs of the architecture with everything on, oracles of them, and our model with the same weights.

Written out as config.json fields: no oracle's defaults, no file of a real model.
"""

from typing import Any

import torch
from transformers import DeepseekV3ForCausalLM as OracleModel

from src.models.deepseek_v3 import DeepseekV3ForCausalLM, config_from_dict

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
    "architectures": ["DeepseekV3ForCausalLM"],
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
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name:
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif "e_score_correction_bias" in name:
                tensor.copy_(0.2 * torch.randn_like(tensor))
            elif "inv_freq" not in name:
                tensor.copy_(0.1 * torch.randn_like(tensor))
    return model.eval()


def hf_state_dict(model: OracleModel) -> dict[str, torch.Tensor]:
    """Its weights under the published names, one tensor an expert."""
    state = {}
    for name, tensor in model.state_dict().items():
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


def ours(fields: dict[str, Any], source: OracleModel, experts_per_shard: int | None = None) -> DeepseekV3ForCausalLM:
    """Our model with the oracle's weights, stacked here by hand, apart from the loader that the project ships."""
    model = DeepseekV3ForCausalLM(config_from_dict(fields), experts_per_shard)
    state = source.state_dict()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            base, found, rest = name.partition(".mlp.experts.")
            if found:
                shard, kind = rest.split(".")
                first = int(shard) * len(tensor)
                tensor.copy_(state[f"{base}.mlp.experts.{kind}"][first : first + len(tensor)])
            else:
                tensor.copy_(state[name])
    return model


def stacked_gradients(model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    """Our gradients under transformers' module names, shards concatenated."""
    gradients: dict[str, torch.Tensor] = {}
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


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((ours - reference).norm() / reference.norm())
