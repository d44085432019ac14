"""What the model says to fixed prompts while it is trained, sampled without gathering it."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from src.errors import UserError

from .loggers import log_texts, spare_the_run
from .phase_timer import Phases

log = logging.getLogger(__name__)

FILE = "samples.jsonl"


class Samples(pl.Callback):
    """Writes answers to `prompts` every `every_n_steps` optimizer steps, to `<default_root_dir>/samples.jsonl` and to
    the loggers that show text.

    All ranks run the ordinary forward together, on whole rows, once for each new token: ZeRO-3 gathers the layers one
    after another, and a token costs one gather of the model, however many prompts there are. The prompts are
    distributed over data-parallel ranks, each of which packs its own into one row, split over its sequence-parallel
    ranks.
    Training is unaffected: no gradients, no routing counts, no draw from a shared generator.

    Args:
        prompts: user messages, rendered by the tokenizer's chat template.
        every_n_steps: optimizer steps between samples; 0: never.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token; above 0 it draws from `seed`, prompt and position alone, the same at
            every step.

    Raises:
        ValueError: a value is out of its range, there are no prompts, or one does not fit the model's context.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        every_n_steps: int = 0,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("temperature", temperature, 0),
        ):
            if value < least:
                raise UserError(f"samples.{name} is {value}; it must be at least {least}.")
        if every_n_steps and not prompts:
            raise UserError(
                f"samples.every_n_steps is {every_n_steps}, but there are no prompts: give --samples.prompts "
                "'[\"...\"]', or 0 steps for none."
            )
        self.prompts = list(dict.fromkeys(prompts or []))
        self.every_n_steps, self.max_new_tokens = every_n_steps, max_new_tokens
        self.temperature, self.seed = temperature, seed
        self._step = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.every_n_steps or stage != "fit":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._tokenizer: Any = data.tokenizer
        self._variables = data.options.chat_template_kwargs
        config: Any = pl_module.config
        self._prompt_ids = [self._render(prompt) for prompt in self.prompts]
        limit = config.max_position_embeddings
        for prompt, ids in zip(self.prompts, self._prompt_ids, strict=True):
            if len(ids) + self.max_new_tokens > limit:
                raise UserError(
                    f"samples.prompts: {prompt[:60]!r} has {len(ids)} tokens; with max_new_tokens "
                    f"{self.max_new_tokens} that is above the model's max_position_embeddings {limit}: shorten it or "
                    "lower max_new_tokens."
                )
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self._ends = {*ends, self._tokenizer.eos_token_id}

    def _render(self, prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self._variables
        )
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids  # the template writes BOS itself
        return ids

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not self.every_n_steps or step == self._step:  # in the middle of accumulation
            return
        self._step = step
        if step % self.every_n_steps:
            return
        with Phases.of(trainer).profile("samples"):
            answers = self._answers(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        texts = [self._tokenizer.decode([i for i in ids if i not in self._ends]) for ids in answers]
        by_prompt = dict(zip(self.prompts, texts, strict=True))
        root = Path(trainer.default_root_dir)
        rows = [
            {"step": step, "prompt": prompt, "text": text, "tokens": len(ids)}
            for (prompt, text), ids in zip(by_prompt.items(), answers, strict=True)
        ]
        with spare_the_run(root / FILE):
            root.mkdir(parents=True, exist_ok=True)
            with open(root / FILE, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        log_texts(trainer, "samples", by_prompt, step)

    def _answers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[list[int]]:
        """Each prompt's new tokens, with the one that ends it; the same on all ranks."""
        training = pl_module.training
        pl_module.eval()
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                own = self._generate(trainer, pl_module)
        finally:
            pl_module.train(training)
        strategy: Any = trainer.strategy
        # [prompts, tokens], each number from one rank, plus one: zero is none
        table = torch.zeros(len(self.prompts), self.max_new_tokens, dtype=torch.int64, device=strategy.root_device)
        if strategy.sp_group.rank == 0:
            for index, ids in own.items():
                table[index, : len(ids)] = torch.tensor(ids, device=table.device) + 1
        rows = strategy.reduce(table, reduce_op="sum").tolist()
        return [[i - 1 for i in row if i > 0] for row in rows]

    def _generate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[int, list[int]]:
        """The new tokens of this data-parallel rank's prompts, by their index."""
        strategy: Any = trainer.strategy
        sp, ranks = strategy.sp_group, strategy.distributed_sampler_kwargs
        own = {index: list[int]() for index in range(ranks["rank"], len(self.prompts), ranks["num_replicas"])}
        for _ in range(self.max_new_tokens):
            running = [index for index, ids in own.items() if not ids or ids[-1] not in self._ends]
            # All ranks run the same number of forwards; a rank without a prompt runs on padding.
            if not strategy.reduce_boolean_decision(bool(running), all=False):
                break
            documents = [self._prompt_ids[index] + own[index] for index in running]
            next_ids = self._next(pl_module, sp, documents, running, strategy.root_device)
            for index, token in zip(running, next_ids, strict=True):
                own[index].append(token)
        return own

    def _next(
        self, model: pl.LightningModule, sp: Any, documents: list[list[int]], prompts: list[int], device: torch.device
    ) -> list[int]:
        """The next token of each document; `prompts` are their prompts' indices."""
        row = [token for document in documents for token in document]
        padding = max(sp.size, -(-len(row) // sp.size) * sp.size) - len(row)
        lengths = torch.tensor([len(document) for document in documents] + [padding] * (padding > 0))
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        local = (len(row) + padding) // sp.size  # T/SP
        ids = torch.tensor(row + [0] * padding)[sp.rank * local :][:local].to(device)
        logits = model(ids, cu_seqlens.to(device), int(lengths.max()))  # [T/SP, V]
        next_ids = torch.zeros(len(documents), dtype=torch.int64)
        for number, (end, index) in enumerate(zip(cu_seqlens[1:].tolist(), prompts, strict=False)):
            owner, place = divmod(end - 1, local)
            if owner == sp.rank:
                next_ids[number] = self._pick(logits[place], index, position=len(documents[number]))
        tokens: list[int] = sp.all_reduce(next_ids.to(device)).tolist() if documents else []
        return tokens

    def _pick(self, logits: Tensor, index: int, position: int) -> int:
        if not self.temperature:
            return int(logits.argmax())
        # Of its own, for whichever rank holds the position.
        generator = torch.Generator().manual_seed(hash((self.seed, index, position)) % 2**63)
        return int(torch.multinomial((logits.float().cpu() / self.temperature).softmax(-1), 1, generator=generator))
