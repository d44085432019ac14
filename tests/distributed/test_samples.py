"""Samples are what transformers generates from the same weights, and training does not notice them; MFU counts all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from src.callbacks.run_record import RunRecord
from src.callbacks.samples import FILE, Samples
from src.callbacks.step_checkpoint import StepCheckpoint
from src.callbacks.throughput import Throughput
from src.callbacks.watchdog import FOLDER, Watchdog
from src.commands.export import export
from src.models.deepseek_v3 import DeepseekV3ForCausalLM
from tests.models.tiny import DEEPSEEK_V3, MtpModel, OracleModel, mtp_oracle, oracle

from .spawn import run_distributed
from .training import MAX_LENGTH, VOCAB, Layout, MemoryCache, Recipe, documents, fit, rows_of, save_model

PROMPTS = ["w5 w6 w7", "w9", "w20 w21 w22 w23 w24 w25 w26"]
NEW_TOKENS = 6
COUNT = 30
RECIPE = Recipe(steps=2, mtp_loss_weight=0.3 if MtpModel is not None else 0.0)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, of the tiny models' vocabulary; a turn is <w2> prompt <w3>, and <w1> ends an answer."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
    tokenizer.chat_template = (
        "{% for m in messages %}w2 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    )
    return tokenizer


class WithTokenizer(pl.Callback):
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.datamodule.tokenizer = word_tokenizer()  # type: ignore[attr-defined]


class Modes(pl.Callback):
    """Counts that sampling must leave alone, after each micro-step; behind `Samples`."""

    def __init__(self) -> None:
        self.training: list[bool] = []
        self.routed: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.training.append(all(module.training for module in pl_module.model.modules()))
        self.routed.append(sum(int(router.load.sum()) for router in pl_module.model.routers))


def run(layout: Layout, directory: str, root: str, prompts: list[str]) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)  # the generators whose draws are compared
    counted: list[tuple[int, ...]] = []
    real = DeepseekV3ForCausalLM.step_flops
    DeepseekV3ForCausalLM.step_flops = lambda self, *counts: counted.append(counts) or real(self, *counts)  # type: ignore
    throughput, modes = Throughput(), Modes()
    callbacks: list[pl.Callback] = [WithTokenizer(), throughput]
    throughput.on_fit_start = lambda *_: setattr(throughput, "_peak", 1e12)  # type: ignore[method-assign]
    if prompts:
        callbacks.append(Samples(prompts, every_n_steps=1, max_new_tokens=NEW_TOKENS))
    watchdog = Watchdog(minutes=10)  # which a run that goes on does not wake
    callbacks += [modes, watchdog, StepCheckpoint(every_n_train_steps=1), RunRecord("", directory, None)]
    result = fit(layout, RECIPE, directory, COUNT, root, more_callbacks=tuple(callbacks))
    assert watchdog._thread is None and not (Path(root) / FOLDER).exists()
    return result | {"training": modes.training, "routed": modes.routed, "counted": counted}


def generated(directory: Path, prompts: list[str]) -> list[str]:
    """Greedy answers of transformers' own model and generation."""
    model = OracleModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer, answers = word_tokenizer(), []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text).input_ids])
        new = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=1, pad_token_id=0)
        answers.append(tokenizer.decode([i for i in new[0, ids.shape[1] :].tolist() if i != 1]))
    return answers


@pytest.mark.parametrize(
    ("layout", "prompts"),
    [
        (Layout(dp=1, sp=2, accumulation=2, batch_size=2), PROMPTS),
        # A group has none, and experts are shared by both.
        (Layout(dp=2, sp=2, accumulation=1, batch_size=2, attention_output="keep", ep=4), PROMPTS[:1]),
    ],
    ids=["2 processes", "4 processes"],
)
def test_samples_are_generations_and_training_does_not_notice(
    layout: Layout, prompts: list[str], tmp_path: Path
) -> None:
    main = oracle(DEEPSEEK_V3)
    mtp = mtp_oracle(main) if MtpModel is not None else None
    directory = save_model(main, DEEPSEEK_V3, tmp_path / "model", mtp)
    with_samples, without = tmp_path / "with", tmp_path / "without"
    sampled = run_distributed(run, layout.world_size, layout, directory, str(with_samples), prompts)
    plain = run_distributed(run, layout.world_size, layout, directory, str(without), [])
    for a, b in zip(sampled, plain, strict=True):
        for name in ("losses", "norms", "draws", "rates", "routed", "training"):
            assert a[name] == b[name], name
        assert all(a["training"])
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in b["weights"])

    rows = [json.loads(line) for line in (with_samples / FILE).read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, p) for step in (1, 2) for p in prompts]
    assert not (without / FILE).exists()
    texts = []
    for step in (1, 2):
        out = tmp_path / f"hf{step}"
        export(str(with_samples / f"checkpoints/step={step}.ckpt"), str(out), "fp32")
        texts += generated(out, prompts)
    assert [row["text"] for row in rows] == texts
    assert len(set(texts)) > 1 and any(len(text.split()) == NEW_TOKENS for text in texts)

    # What MFU counts of each step: its documents over all ranks, once each, without padding.
    cache = MemoryCache(documents(COUNT))
    packed = rows_of(cache, packing=True)
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0)).tolist()
    for step, counts in enumerate(plain[0]["counted"]):
        lengths = [int(cache.lengths[s]) for r in order[4 * step : 4 * step + 4] for s in packed[r]]
        assert counts[:2] == (sum(lengths), sum(n * n for n in lengths))
    assert len(plain[0]["counted"]) == 2


def error_of(directory: str, root: str, samples: dict[str, Any]) -> str:
    layout, recipe = Layout(dp=1, sp=1, accumulation=1, batch_size=1), replace(RECIPE, steps=1, mtp_loss_weight=0.0)
    try:
        fit(layout, recipe, directory, 8, root, more_callbacks=(WithTokenizer(), Samples(**samples)))
    except ValueError as error:
        return str(error)
    return ""


def test_a_prompt_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    directory = save_model(oracle(DEEPSEEK_V3), DEEPSEEK_V3, tmp_path)
    samples = {"prompts": ["w5 " * 2 * MAX_LENGTH], "every_n_steps": 1, "max_new_tokens": 8}
    (error,) = run_distributed(error_of, 1, directory, str(tmp_path), samples)
    assert "has 130 tokens; with max_new_tokens 8 that is above the model's max_position_embeddings 128" in error
