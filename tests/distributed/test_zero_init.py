"""The model also builds under DeepSpeed's own zero.Init, which casts what is made inside it to bf16."""

from pathlib import Path

import deepspeed
import pytest
import torch

from src.models.deepseek_v3 import DeepseekV3ForCausalLM, load_config
from src.weights.hf_reader import HFDirectorySource
from src.weights.load import load
from tests.models.tiny import DEEPSEEK_V3, oracle, packed, samples

from .spawn import run_distributed
from .training import save_model

LENGTHS = [30, 2, 40]


def bf16_loss(directory: str) -> tuple[float, list[torch.Tensor]]:
    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = DeepseekV3ForCausalLM(load_config(directory))
    load(model, HFDirectorySource(directory), num_hidden_layers=3, progress=False)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    loss = engine(**packed(samples([range(96)] * 3, LENGTHS))).loss
    engine.backward(loss)
    return loss.item(), [router.e_score_correction_bias for router in model.routers]


def test_it_builds_loads_and_runs_with_the_bias_exact(tmp_path: Path) -> None:
    reference = oracle(DEEPSEEK_V3)
    directory = save_model(reference, DEEPSEEK_V3, tmp_path)
    model = DeepseekV3ForCausalLM(load_config(directory))
    load(model, HFDirectorySource(directory), num_hidden_layers=3, progress=False)
    expected = model(**packed(samples([range(96)] * 3, LENGTHS))).loss.item()
    for loss, biases in run_distributed(bf16_loss, 2, directory):
        assert loss == pytest.approx(expected, rel=1e-2)
        for bias, router in zip(biases, model.routers, strict=True):
            assert bias.dtype == torch.float32 and torch.equal(bias, router.e_score_correction_bias)
