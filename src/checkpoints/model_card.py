"""The README.md of an export: the run as the checkpoint's own files record it, and how to use the weights.

It contains only what config.yaml, run.json or hf/ contain; an unknown fact has no line. Files and models are named
without their folders, which appear only in the quoted configuration.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from src.checkpoints.run_files import RUN_CONFIG, read_record, read_settings
from src.weights.kept import Kept, table
from src.weights.output import Dtype

CARD = "README.md"

_FORMATS = {
    "bf16": "BF16",
    "fp8": "FP8 (e4m3) in blocks of 128 x 128 with FP32 scales; embedding, head, norms and routers in BF16",
    "fp32": "FP32, the optimizer's master weights",
}
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def model_card(
    record: Path, config: dict[str, Any], dtype: Dtype, *, mtp: bool, kept: Mapping[str, Kept] | None = None
) -> str:
    """The card's text.

    Args:
        record: directory with config.yaml, run.json and hf/, like a checkpoint's; either file may be missing.
        config: the content of config.json.
        dtype: of the weights written.
        mtp: whether the multi-token-prediction block is among them.
        kept: how much of the training they keep, by group of weights; empty or None: not measured.
    """
    facts, settings = read_record(record), read_settings(record)
    sections = [
        _header(facts, settings),
        "# Model card\n\nWritten by the export from what the checkpoint recorded of its training.",
        "\n".join(
            ["| fact | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in _rows(facts, settings))]
            + [f"| weights | {_FORMATS[dtype]} |", f"| multi-token prediction | {_mtp(mtp, config)} |"]
        ),
        *([_rounding(kept or {})] if dtype != "fp32" and not _from_scratch(settings) else []),
        _usage(record / "hf", dtype, mtp),
    ]
    if settings:
        text = (record / RUN_CONFIG).read_text(encoding="utf-8")
        sections.append(f"## Configuration of the run\n\n```yaml\n{text.rstrip()}\n```")
    return "\n\n".join(sections) + "\n"


def from_scratch(record: Path) -> bool:
    """Whether the run that `record` describes started from random weights."""
    return _from_scratch(read_settings(record))


def _rounding(kept: Mapping[str, Kept]) -> str:
    title = "## What rounding leaves of the training\n\n"
    if not kept:
        return title + "Not measured: the base was not beside these weights when they were written."
    return f"""{title}The change of the rounded weights along that of the FP32 masters, both from the base; and by how
much single weights are off, relative to their change.

{table(kept)}"""


def _header(facts: dict[str, Any], settings: dict[str, Any]) -> str:
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if "license" in facts:
        header["license"] = facts["license"]
    repository = _repository(facts.get("base", ""))
    if repository and not _from_scratch(settings):
        header |= {"base_model": repository, "base_model_relation": "finetune"}
    return f"---\n{yaml.safe_dump(header)}---"


def _repository(base: str) -> str | None:
    """The Hugging Face repository of a directory in the hub's cache, models--OWNER--NAME/snapshots/REVISION."""
    match = _HUB_CACHE.search(base)
    return f"{match[1]}/{match[2]}" if match else None


def _from_scratch(settings: dict[str, Any]) -> bool:
    return bool((settings.get("model") or {}).get("from_scratch"))


def _rows(facts: dict[str, Any], settings: dict[str, Any]) -> list[tuple[str, str]]:
    """The known facts of the run, in the table's order."""
    model, data, trainer = (settings.get(name) or {} for name in ("model", "data", "trainer"))
    strategy = (trainer.get("strategy") or {}).get("init_args", {}) if isinstance(trainer.get("strategy"), dict) else {}
    rows: list[tuple[str, str]] = []

    def add(name: str, value: object, text: str | None = None) -> None:
        if value is not None:
            rows.append((name, text if text is not None else str(value)))

    if "base" in facts:
        name = _repository(facts["base"]) or PurePath(facts["base"]).name
        add("base", name, f"none: random weights, the architecture of {name}" if _from_scratch(settings) else name)
    for kind in ("train", "val"):
        if files := data.get(f"{kind}_files"):
            add(f"{kind} files", ", ".join(f"`{PurePath(file).name}`" for file in files))
    add("hash of the train data", facts.get("data", {}).get("train", {}).get("hash"))
    add("optimizer steps", facts.get("step"))
    if "tokens" in facts:
        add("training tokens", facts["tokens"], f"{facts['tokens']:,}, prompts included, padding not")
    if "max_length" in data:
        packed = "packed rows" if data.get("packing", True) else "one sample a row"
        add("tokens per row", data["max_length"], f"{data['max_length']:,}, {packed}")
    if {"learning_rate", "min_learning_rate", "warmup_ratio"} <= model.keys():
        peak, floor, warmup = (model[name] for name in ("learning_rate", "min_learning_rate", "warmup_ratio"))
        add("learning rate", peak, f"AdamW, linear to {peak:g} over {warmup:g} of the steps, cosine to {floor:g}")
    for name, loss in facts.get("losses", {}).items():
        add(name, loss["value"], f"{loss['value']:.6f} at step {loss['step']}")
    add("processes", facts.get("world_size"))
    add("sequence parallelism", strategy.get("sequence_parallel_size"))
    add("ZeRO stage", strategy.get("stage"))
    add("precision", trainer.get("precision"))
    add("code revision", facts.get("git_revision"))
    if versions := facts.get("versions"):
        add("versions", ", ".join(f"{package} {version}" for package, version in versions.items()))
    return rows


def _mtp(written: bool, config: dict[str, Any]) -> str:
    layer = config["num_hidden_layers"]
    return f"its block is layer {layer}" if written else "no block"


def _usage(side: Path, dtype: Dtype, mtp: bool) -> str:
    templates = [*side.glob("chat_template.*"), *side.glob("tokenizer_config.json")]
    serve = ["vllm serve DIRECTORY", "--tensor-parallel-size 8"]
    if dtype == "fp32":
        serve.append("--dtype bfloat16")
    if any("</think>" in file.read_text(encoding="utf-8") for file in templates):
        serve.append("--reasoning-parser deepseek_r1")
    loading = "Transformers has the architecture; no code of this directory is run."
    if dtype == "fp8":
        loading += " FP8 needs the package accelerate and a GPU that computes in FP8."
    if mtp:
        serve.append("""--speculative-config '{"method": "deepseek_mtp", "num_speculative_tokens": 1}'""")
        loading += " It leaves the multi-token-prediction block out."
    lines = " \\\n    ".join(serve)
    return f"""## Use

With vLLM, one node of eight GPUs; for more nodes add `--pipeline-parallel-size`:

```bash
{lines}
```

{loading}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
model = AutoModelForCausalLM.from_pretrained("DIRECTORY", dtype="auto", device_map="auto")
```"""
