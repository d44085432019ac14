"""Model cards: every fact that the checkpoint has, none that it has not, and nobody's folders but in the config."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.checkpoints.model_card import model_card

CONFIG = {"num_hidden_layers": 61}
RUN = {
    "base": "/home/ann/.cache/huggingface/hub/models--deepseek-ai--DeepSeek-V3/snapshots/0123abcd",
    "license": "mit",
    "git_revision": "89abcdef+changes",
    "versions": {"python": "3.12.1", "torch": "2.11.0"},
    "world_size": 256,
    "step": 1234,
    "tokens": 5678901,
    "losses": {"train/loss": {"value": 1.25, "step": 1234}, "val/loss": {"value": 1.5, "step": 1200}},
}
SETTINGS: dict[str, Any] = {
    "model": {"learning_rate": 2e-7, "min_learning_rate": 0.0, "warmup_ratio": 0.03, "from_scratch": False},
    "data": {"train_files": ["/home/ann/chats/*.jsonl", "b.parquet"], "val_files": None, "max_length": 32768},
    "trainer": {
        "precision": "bf16-true",
        "strategy": {"class_path": "S", "init_args": {"sequence_parallel_size": 4, "stage": 3}},
    },
}


def record(folder: Path, run: dict[str, Any] | None, settings: dict[str, Any] | None) -> Path:
    (folder / "hf").mkdir()
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def header(card: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return fields


def rows(card: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {name: value for name, value in lines[2:]}


def test_every_recorded_fact(tmp_path: Path) -> None:
    card = model_card(record(tmp_path, RUN, SETTINGS), CONFIG, "bf16", mtp=True)
    assert header(card) == {
        "base_model": "deepseek-ai/DeepSeek-V3",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
    }
    assert rows(card) == {
        "base": "deepseek-ai/DeepSeek-V3",
        "train files": "`*.jsonl`, `b.parquet`",
        "optimizer steps": "1234",
        "training tokens": "5,678,901, prompts included, padding not",
        "tokens per row": "32,768, packed rows",
        "learning rate": "AdamW, linear to 2e-07 over 0.03 of the steps, cosine to 0",
        "train/loss": "1.250000 at step 1234",
        "val/loss": "1.500000 at step 1200",
        "processes": "256",
        "sequence parallelism": "4",
        "ZeRO stage": "3",
        "precision": "bf16-true",
        "code revision": "89abcdef+changes",
        "versions": "python 3.12.1, torch 2.11.0",
        "weights": "BF16",
        "multi-token prediction": "its block is layer 61",
    }
    before, config = card.split("```yaml\n")
    assert yaml.safe_load(config.removesuffix("```\n")) == SETTINGS
    assert "/home" not in before


def test_what_is_not_recorded_is_not_said(tmp_path: Path) -> None:
    card = model_card(record(tmp_path, None, None), CONFIG, "fp8", mtp=False)
    assert header(card).keys() == {"library_name", "pipeline_tag"}
    assert list(rows(card)) == ["weights", "multi-token prediction"]
    assert "yaml" not in card and "speculative" not in card and "reasoning" not in card and "accelerate" in card


def test_random_weights_have_no_base_model(tmp_path: Path) -> None:
    settings = SETTINGS | {"model": {"from_scratch": True}}
    card = model_card(record(tmp_path, RUN | {"base": "/models/tiny"}, settings), CONFIG, "fp32", mtp=False)
    assert "base_model" not in header(card)
    assert rows(card)["base"] == "none: random weights, the architecture of tiny"


@pytest.mark.parametrize(("template", "said"), [("{{ x }}</think>", True), ("{{ x }}", False)])
def test_the_command_for_vllm_fits_the_files(template: str, said: bool, tmp_path: Path) -> None:
    folder = record(tmp_path, None, None)
    (folder / "hf/chat_template.jinja").write_text(template)
    card = model_card(folder, CONFIG, "fp32", mtp=True)
    assert ("--reasoning-parser deepseek_r1" in card) is said
    assert "--dtype bfloat16" in card and '{"method": "deepseek_mtp", "num_speculative_tokens": 1}' in card
