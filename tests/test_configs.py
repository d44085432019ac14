"""Every shipped YAML goes through the real CLI; they differ in values alone; their models are the architecture's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from src.checkpoints.key_map import hf_shapes
from src.models.deepseek_v3 import DeepseekV3ForCausalLM, load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.name != "base.yaml")
MODELS = sorted((ROOT / "configs/models").rglob("config.json"))


def parsed(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "src.cli", "fit", "--config", str(path), "--print_config"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    config: dict[str, Any] = yaml.safe_load(result.stdout)
    return config


def keys(config: Any, prefix: str = "") -> set[str]:
    if not isinstance(config, dict):
        return {prefix}
    return {key for name, value in config.items() for key in keys(value, f"{prefix}.{name}")}


def test_none_is_missed() -> None:
    assert [p.stem for p in CONFIGS] == ["1gpu_small", "32n_sp4", "tiny_cpu"]
    assert [p.parent.name for p in MODELS] == ["deepseek-v3", "small", "tiny"]


def test_all_parse_and_differ_in_values_alone() -> None:
    configs = {path.stem: parsed(path) for path in CONFIGS}
    shape = keys(configs["tiny_cpu"])
    for name, config in configs.items():
        assert keys(config) == shape, name
    strategy = configs["32n_sp4"]["trainer"]["strategy"]
    assert strategy["class_path"] == "src.strategies.DeepSpeedSPStrategy"
    assert strategy["init_args"]["sequence_parallel_size"] == 4 and configs["32n_sp4"]["trainer"]["num_nodes"] == 32


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.parent.name)
def test_models_are_of_the_architecture(path: Path) -> None:
    config = load_config(path.parent)
    assert config.num_attention_heads % 4 == 0
    if path.parent.name == "deepseek-v3":
        fields = json.loads(path.read_text())
        assert (fields["num_hidden_layers"], fields["n_routed_experts"], fields["hidden_size"]) == (61, 256, 7168)
        assert config.rope_parameters["mscale_all_dim"] == 1.0 and config.num_nextn_predict_layers == 1


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.parent.name)
def test_models_build_without_memory_and_have_the_published_number_of_parameters(path: Path) -> None:
    config = load_config(path.parent)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    found = sum(p.numel() for p in model.parameters()) + sum(r.e_score_correction_bias.numel() for r in model.routers)
    assert found == sum(torch.Size(shape).numel() for shape in hf_shapes(config, mtp=False).values())
    if path.parent.name == "deepseek-v3":
        assert found == 671_026_419_200
