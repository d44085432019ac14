"""The demo's conversations: the committed files are what the generator writes, and what they say is true."""

import json
import re
import subprocess
import sys
from collections import Counter
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data" / "demo"
Messages = list[dict[str, Any]]


def read(name: str) -> list[Messages]:
    return [json.loads(line)["messages"] for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


TRAIN, VAL = read("train.jsonl"), read("val.jsonl")


def questions_and_answers() -> list[tuple[str, str]]:
    """Every question that the next message answers itself, so without the tools' and the first tries."""
    pairs = []
    for messages in TRAIN + VAL:
        for question, answer in zip(messages, messages[1:], strict=False):
            if question["role"] == "user" and answer.get("reasoning_content") and answer["content"]:
                pairs.append((question["content"], answer["content"]))
    return pairs


def bold(answer: str) -> list[str]:
    return re.findall(r"\*\*(.+?)\*\*", answer)


def test_the_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "make_demo_data.py", "--out", tmp_path], check=True)
    for name in ("train.jsonl", "val.jsonl", "facts.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), f"{name}: run scripts/make_demo_data.py"


def test_sizes_kinds_and_languages() -> None:
    assert (len(TRAIN), len(VAL)) == (360, 40)
    for part in (TRAIN, VAL):
        counts: Counter[str] = Counter()
        for messages in part:
            counts["several turns"] += sum(message["role"] == "user" for message in messages) > 1
            counts["system"] += messages[0]["role"] == "system"
            counts["without loss"] += any(message.get("loss") is False for message in messages)
            counts["tool"] += any(message["role"] == "tool" for message in messages)
            counts["reasoning"] += any(message.get("reasoning_content") for message in messages)
            counts["Chinese"] += bool(re.search("[一-鿿]", json.dumps(messages, ensure_ascii=False)))
        assert counts["reasoning"] == len(part)
        assert 0.4 < counts["Chinese"] / len(part) < 0.6
        assert 0.25 < counts["several turns"] / len(part) < 0.5
        assert 0.1 < counts["system"] / len(part) < 0.4
        assert 0 < counts["without loss"] / len(part) < 0.15
        assert 0 < counts["tool"] / len(part) < 0.15


def test_no_validation_conversation_is_in_train() -> None:
    def opening(messages: Messages) -> str:
        return next(str(message["content"]) for message in messages if message["role"] == "user")

    openings = [opening(messages) for messages in TRAIN + VAL]
    assert len(set(openings)) == len(openings)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?P<name>\w+) buys (?P<count>\d+) \w+ at (?P<price>\d+) dollars each and pays with (?P<paid>\d+) dollars",
        r"(?P<name>\w+)买了(?P<count>\d+)\w+，每\w(?P<price>\d+)元，付了(?P<paid>\d+)元",
    ],
)
def test_change(pattern: str) -> None:
    found = [(match, bold(answer)) for text, answer in questions_and_answers() if (match := re.match(pattern, text))]
    assert len(found) > 3
    for match, numbers in found:
        assert numbers == [str(int(match["paid"]) - int(match["count"]) * int(match["price"]))]


def test_the_larger_decimal() -> None:
    pattern = r"Which number is larger, ([\d.]+) or ([\d.]+)\?|([\d.]+) 和 ([\d.]+) 哪个大"
    found = [(match, bold(answer)) for text, answer in questions_and_answers() if (match := re.match(pattern, text))]
    assert len(found) > 6
    for match, numbers in found:
        assert numbers == [max((text for text in match.groups() if text), key=Decimal)]


def test_dates() -> None:
    pattern = r"What date is (?P<days>\d+) days after (?P<start>.+)\?"
    found = [(match, bold(answer)) for text, answer in questions_and_answers() if (match := re.match(pattern, text))]
    assert len(found) > 3
    for match, (answer,) in found:
        start, end = (datetime.strptime(text, "%d %B %Y") for text in (match["start"], answer))
        assert end - start == timedelta(days=int(match["days"]))


def test_every_equation_holds() -> None:
    """Each `a op b = c` of the reasonings, whatever its family."""
    operations = {"+": "__add__", "-": "__sub__", "×": "__mul__", "÷": "__truediv__"}
    count = 0
    for messages in TRAIN + VAL:
        for message in messages:
            # Nothing before the first number, so that it is no part of a longer expression.
            pattern = r"(?<![\d+×÷()-] )(?<![\d.])([\d.]*\d) ([-+×÷]) ([\d.]*\d) = ([\d.]*\d)"
            for left, sign, right, result in re.findall(pattern, message.get("reasoning_content", "")):
                assert getattr(Decimal(left), operations[sign])(Decimal(right)) == Decimal(result), message
                count += 1
    assert count > 400


def test_a_tool_call_is_one_of_the_openai_format_and_its_answer_right() -> None:
    calls = [messages for messages in TRAIN + VAL if any(message["role"] == "tool" for message in messages)]
    for _, _, asked, result, answer in calls:
        (call,) = asked["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert call["type"] == "function"
        if call["function"]["name"] == "multiply":
            expected = arguments["a"] * arguments["b"]
        else:
            expected = (datetime.fromisoformat(arguments["end"]) - datetime.fromisoformat(arguments["start"])).days
        assert json.loads(result["content"]) == {"result": expected}
        assert bold(answer["content"]) == [str(expected)]
