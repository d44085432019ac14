"""Mutated rows: each ends as an error with file and row, or as tokens equal to the template's rendering.

    python -m tests.datamodules.fuzz [--rows 10000] [--seed 0] [--control_tokens error|text|keep]

Rows are made from a seed and dressed (what means the same: thinking merged into the content or without its opening
tag, line breaks around it, an end of turn in the answer, nulls) or broken (types, roles, surrogates, control tokens,
nesting, every fault of JSON), written to a file and read back by the project. What is expected of a taken row is
computed without it: contexts by transformers' apply_chat_template on the plain messages, targets by it too where the
template shows the whole last turn, otherwise from what `forms.FORMS` says of it.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from src.datamodules.chat_template import ChatTemplate, Sample
from src.datamodules.control_tokens import ControlTokens
from src.datamodules.reader import scan
from src.datamodules.tokenization import TokenizeOptions, tokenize_spans

from .forms import FORMS, Known, forms_tokenizer, with_template
from .mutated_rows import Row, file_of


def served(messages: list[Row], end: str) -> list[Row]:
    """Messages as a server has them: no nulls, no `loss`, thinking apart, no end of turn in an answer."""
    result = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value not in (None, []) and key != "loss"}
        kept["content"] = kept.get("content", "")
        reasoning = kept.pop("reasoning_content", "") or None
        if message["role"] == "assistant" and "</think>" in kept["content"]:
            assert reasoning is None
            reasoning, kept["content"] = kept["content"].split("</think>")
            reasoning = re.sub(r"^\s*<think>", "", reasoning)
        while message["role"] == "assistant" and "tool_calls" not in kept and kept["content"].rstrip().endswith(end):
            kept["content"] = kept["content"].rstrip().removesuffix(end)
        if reasoning is not None:
            kept["reasoning_content"] = reasoning.strip("\r\n")
            kept["content"] = kept["content"].lstrip("\r\n")
        if "tool_calls" in kept:
            kept["tool_calls"] = [{"type": "function", **call} for call in kept["tool_calls"]]
        result.append(kept)
    return result


def expected(
    messages: list[Row], known: Known, tokenizer: PreTrainedTokenizerFast, control_tokens: ControlTokens
) -> Iterator[tuple[list[int], str]]:
    """(context's tokens, target's text) of each trained turn."""
    sanitize = {"sanitize_control_tokens": True} if control_tokens == "text" else {}

    def render(messages: list[Row], generate: bool = False) -> str:
        shown = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate, **known.variables
        )
        assert isinstance(shown, str)
        return shown

    lone = [{"role": "user", "content": "?"}]
    header, _, end = render([*lone, {"role": "assistant", "content": "MARK"}]).partition("MARK")
    between = end[len(end.rstrip("\n")) :]
    history = served(messages, end.strip())
    for index, message in enumerate(history):
        if message["role"] != "assistant" or messages[index].get("loss") is False:
            continue
        prompt = render(history[:index], True)
        ids = tokenizer.apply_chat_template(
            history[:index], add_generation_prompt=True, return_dict=False, **sanitize, **known.variables
        )
        reasoning = message.get("reasoning_content")
        whole = render(history[: index + 1])
        if known.trims_reasoning and reasoning is not None:
            reasoning = reasoning.strip()
        if not reasoning and (known.thinking is None or "m.reasoning_content" in known.template):
            reasoning = None
        shown = known.thinking is not None and f"{reasoning}{known.thinking.closing}" in whole[len(prompt) :]
        if whole.startswith(prompt) and (reasoning is None or shown):
            yield ids, whole[len(prompt) :].removesuffix(between)
            continue
        plain = {key: value for key, value in message.items() if key != "reasoning_content"}
        body = render([*lone, plain]).removeprefix(header).removesuffix(between)
        bare = known.bare[history[index - 1]["role"] == "tool"]
        if reasoning is None and bare is not None:
            yield ids, bare + body
            continue
        assert known.thinking is not None
        block = f"{known.thinking.opening}{reasoning or ''}{known.thinking.closing}"
        yield (
            ids,
            (block.removeprefix(known.thinking.opening) if prompt.endswith(known.thinking.opening) else block) + body,
        )


def compare(
    samples: list[Sample],
    messages: list[Row],
    known: Known,
    tokenizer: PreTrainedTokenizerFast,
    control_tokens: ControlTokens,
) -> str | None:
    """What is not as expected; None where all is."""
    found = [
        (sample.input_ids[:start], sample.input_ids[start:stop])
        for sample in samples
        for start, stop in sample.target_spans
    ]
    wanted = list(expected(messages, known, tokenizer, control_tokens))
    if len(found) != len(wanted):
        return f"{len(found)} targets instead of {len(wanted)}"
    for (context, target), (ids, said) in zip(found, wanted, strict=True):
        if context != ids:
            return f"context {tokenizer.decode(context)!r} instead of {tokenizer.decode(ids)!r}"
        if control_tokens != "text" and target != tokenizer.encode(said, add_special_tokens=False):
            return f"target {tokenizer.decode(target)!r} instead of {said!r}"
        if tokenizer.decode(target) != said:
            return f"target {tokenizer.decode(target)!r} instead of {said!r}"
    return None


def trained(path: Path, template: ChatTemplate) -> tuple[dict[int, list[Sample]], dict[int, str]]:
    """What the project makes of a file: samples and errors, by row. Bad rows are skipped, so that all are listed."""
    options = TokenizeOptions(1 << 30, bad_rows="skip")
    work = [(index, 0, span) for index, span in enumerate(scan(str(path)).spans)]
    reports = path.with_suffix(".reports")
    reports.mkdir()
    samples: dict[int, list[Sample]] = {}
    for columns in tokenize_spans(work, template, options, reports, all_errors=True):
        spans = columns["target_spans"].reshape(-1, 2).tolist()
        samples.setdefault(columns["row"], []).append(Sample(columns["input_ids"].tolist(), spans))
    listed = [json.loads(line) for file in reports.glob("*.skipped") for line in file.read_text().splitlines()]
    errors = {int(error["row"].removeprefix(f"{path}:")): f"{error['field']}: {error['problem']}" for error in listed}
    return samples, errors


def fuzz(
    rows: int,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    control_tokens: ControlTokens = "error",
    forms: Mapping[str, Known] = FORMS,
) -> tuple[Counter[str], list[str]]:
    """How many rows ended how, and what is wrong."""
    rng = random.Random(seed)
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    for number, (name, known) in enumerate(forms.items()):
        own = with_template(tokenizer, known.template)
        own.chat_control_tokens = [token for token in own.added_tokens_encoder if "think>" not in token]
        template = ChatTemplate(own, control_tokens=control_tokens, variables=known.variables)
        end = "<|im_end|>" if "<|im_end|>" in known.template else "<｜end▁of▁sentence｜>"
        path = folder / f"{number}.jsonl"
        count = (number + 1) * rows // len(forms) - number * rows // len(forms)
        meant = file_of(rng, count, known, end, path)
        samples, errors = trained(path, template)
        for row, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            problem = None
            if row in errors:
                ends["named"] += 1
                if row in meant and known.thinking is not None:
                    problem = f"a sound row is named: {errors[row]}"
            elif line.strip():
                ends["tokens"] += 1
                try:
                    messages = meant.get(row) or json.loads(line.removeprefix(b"\xef\xbb\xbf"))["messages"]
                    problem = compare(samples.get(row, []), messages, known, own, control_tokens)
                except Exception as error:
                    problem = f"taken, but nothing tells what it should be ({type(error).__name__}: {error})"
            if problem is not None:
                wrong.append(f"{name}, seed {seed}, row {row}: {problem[:600]}\n    {line[:600]!r}")
    return ends, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutated rows against transformers' chat templates.")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--control_tokens", choices=("error", "text", "keep"), default="error")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends, wrong = fuzz(arguments.rows, arguments.seed, forms_tokenizer(), Path(folder), arguments.control_tokens)
    print(*wrong, sep="\n")
    print(f"{arguments.rows:,} rows: {dict(ends)}, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
