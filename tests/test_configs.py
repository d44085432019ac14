"""Every shipped YAML goes through the real CLI; they differ in values alone; their models are the architecture's.

Each says in its head how it is launched and what `plan` says of it; both are kept true here.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from src.commands.config_command import ConfigCommand
from src.commands.plan import verdict
from src.models.deepseek_v3 import DeepseekV3ForCausalLM, load_config
from src.weights.key_map import hf_shapes
from tests.command import ROOT, run

PARTS = ("671b.yaml", "base.yaml", "full.yaml")  # of the other files, no run of its own
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.name not in PARTS)
GUIDE = {  # nodes, SP, optimizer on the host, rows a DP rank: the guide's table
    "16n_sp8": (16, 8, True, 2),
    "32n_sp8_bs1": (32, 8, True, 1),
    "32n_sp4_bs1": (32, 4, True, 1),
    "32n_sp1_bs1": (32, 1, True, 1),
    "32n_sp4": (32, 4, True, 2),
    "32n_sp1": (32, 1, True, 2),
    "32n_sp4_zero3": (32, 4, False, 1),
    "32n_sp1_zero3": (32, 1, False, 1),
}
OTHERS = ["1gpu_small", "1n_moonlight", "2gpu_sp2", "32n_128rows", "32n_32k", "32n_4k", "32n_64rows", "demo"]
OTHERS += ["32n_128rows_ep8", "32n_64rows_ep8", "tiny_cpu"]
MODELS = sorted((ROOT / "configs/models").rglob("config.json"))


class Parse(ConfigCommand):
    """The CLI's own parser, which `fit` has too, in this process."""

    name = "parse"

    def run_command(self) -> None:
        pass


def parsed(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = Parse(["--config", str(path)]).config.as_dict()
    return config


def keys(config: Any, prefix: str = "") -> set[str]:
    if not isinstance(config, dict):
        return {prefix}
    return {key for name, value in config.items() for key in keys(value, f"{prefix}.{name}")}


def test_none_is_missed() -> None:
    assert [p.stem for p in CONFIGS] == sorted([*GUIDE, *OTHERS])
    models = ["deepseek-v3", "deepseek-v3-slim", "demo", "moonlight-16b", "small", "tiny"]
    assert [p.parent.name for p in MODELS] == models


def test_fit_takes_a_file_and_prints_all_of_it() -> None:
    result = run("fit", "--config", "configs/32n_sp4.yaml", "--print_config")
    options = yaml.safe_load(result.stdout)["trainer"]["strategy"]["init_args"]
    assert options["sequence_parallel_size"] == 4 and options["offload_optimizer"] is True


def test_all_parse_and_differ_in_values_alone() -> None:
    configs = {path.stem: parsed(path) for path in CONFIGS}
    shape = keys(configs["tiny_cpu"])
    for name, config in configs.items():
        assert keys(config) == shape, name
        assert config["trainer"]["default_root_dir"] == f"runs/{name}"
    for name, row in GUIDE.items():
        trainer, data = configs[name]["trainer"], configs[name]["data"]
        options = trainer["strategy"]["init_args"]
        found = trainer["num_nodes"], options["sequence_parallel_size"], options["offload_optimizer"]
        assert (*found, data["batch_size"]) == row, name
        assert (data["max_length"], trainer["accumulate_grad_batches"], trainer["devices"]) == (32768, 4, 8)
        assert trainer["gradient_clip_val"] == 1.0 and configs[name]["model"]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_head_says_how_to_launch_it_and_what_plan_says(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"configs/{path.name}" in line and re.match(r"#   (sbatch|torchrun|python) ", line) for line in head)
    (said,) = [line.removeprefix("# plan: ") for line in head if line.startswith("# plan: ")]
    assert said == verdict(path)


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
    if path.parent.name == "moonlight-16b":
        assert round(found / 1e9, 2) == 15.96
