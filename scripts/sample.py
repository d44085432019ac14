"""Loads an exported checkpoint with transformers and lets it answer: `python scripts/sample.py DIR [--prompt TEXT]`.

With `--learned FILE.jsonl` it is first asked all that it was trained on, and told how much of it comes word for word.

Fails where the export and transformers disagree on any tensor's name or shape.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PROMPTS = ["Which number is larger, 9.11 or 9.8?", "5 千克等于多少克？"]


def load(folder: Path) -> Any:
    """Returns the model in evaluation mode, on the GPU where there is one.

    Raises SystemExit naming the tensors if any is missing, unexpected or of another shape. The multi-token-prediction
    layers (`model.layers.N`, N from num_hidden_layers) are not expected: transformers does not build them.
    """
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    first_mtp, count_mtp = model.config.num_hidden_layers, getattr(model.config, "num_nextn_predict_layers", 0) or 0
    mtp = tuple(f"model.layers.{first_mtp + i}." for i in range(count_mtp))
    unexpected = [name for name in report["unexpected_keys"] if not name.startswith(mtp)]
    problems = {kind: sorted(names) for kind, names in {**report, "unexpected_keys": unexpected}.items() if names}
    if problems:
        raise SystemExit(f"{folder}: transformers and the export disagree: {problems}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> tuple[str, str]:
    """Returns the rendered prompt and the greedy continuation, special tokens included."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    length = inputs["input_ids"].shape[1]
    return tokenizer.decode(output[0, :length]), tokenizer.decode(output[0, length:])


def ask_learned(model: Any, tokenizer: Any, file: Path, shown: int = 4) -> None:
    """Asks the first question of each row, greedily, and compares all of the answer, reasoning included."""
    right = 0
    for index, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        question, reply = json.loads(line)["messages"]
        wanted = f"<think>\n{reply['reasoning_content']}\n</think>\n\n{reply['content']}"
        _, text = answer(model, tokenizer, question["content"], 2 * len(tokenizer.encode(wanted)))
        right += text == wanted + tokenizer.eos_token
        if index < shown:
            print(f"\nprompt   {question['content']}\nanswer   {text}")
    print(f"\n{right} of {index + 1} answers are word for word those of {file}, thinking included.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the exported Hugging Face directory")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="one or several user messages")
    parser.add_argument("--learned", type=Path, help="JSONL of the conversations that it was trained on")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args()
    if not (args.folder / "config.json").is_file():
        raise SystemExit(f"{args.folder} is no exported model: it has no config.json")
    logging.set_verbosity_error()  # what is missing or unexpected, we say ourselves
    logging.disable_progress_bar()
    model = load(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.folder}: every tensor in its place, {parameters / 1e6:.1f} M parameters, {model.dtype}.")
    if args.learned:
        ask_learned(model, tokenizer, args.learned)
    for prompt in args.prompt:
        rendered, text = answer(model, tokenizer, prompt, args.max_new_tokens)
        print(f"\nprompt   {rendered}\nanswer   {text}")


if __name__ == "__main__":
    main()
