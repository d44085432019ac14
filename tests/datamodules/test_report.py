import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from src.datamodules import SFTDataModule, cache_build, findings, reader
from src.datamodules.cache import open_or_build, open_or_check
from src.datamodules.chat_template import ChatTemplate
from src.datamodules.collate import Document
from src.datamodules.copies import firsts
from src.datamodules.findings import Findings
from src.datamodules.report.collect import Cut, SetReport, check
from src.datamodules.report.html import page
from src.datamodules.report.segments import segments
from src.datamodules.report.text import report_lines, show
from src.datamodules.rows import RowError
from src.datamodules.tokenization import TokenizeOptions

from .conftest import question_answer

Write = Callable[..., str]
GOOD = question_answer("q", "a")
BAD_ROLE = [{"role": "bot", "content": "q"}]
BAD_TWICE = [{"role": "user", "content": 1}, {"role": "assistant", "content": "a", "loss": "yes"}]


def datamodule(tokenizer: PreTrainedTokenizerFast, folder: Path, train: list[str], **more: Any) -> SFTDataModule:
    arguments = {"max_length": 64, "batch_size": 2, "cache_dir": str(folder / "cache"), **more}
    data = SFTDataModule(train, **arguments)
    data.tokenizer = tokenizer
    return data


def remarked(report: SetReport) -> list[tuple[int, list[RowError]]]:
    return [kind for remarks in report.remarks for kind in remarks.by_kind()]


def text(reports: list[SetReport], tokenizer: PreTrainedTokenizerFast) -> str:
    return "\n".join(report_lines(reports, tokenizer, colour=False))


@pytest.mark.parametrize("num_proc", [1, 2])
def test_everything_wrong_is_found_at_once_and_leaves_no_cache(
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_proc: int,
) -> None:
    monkeypatch.setattr(reader, "ROWS_PER_SPAN", 2)
    path = write_jsonl("a.jsonl", GOOD, BAD_ROLE, BAD_TWICE, GOOD, question_answer("q " * 99, "a"), [])
    with open(path, "a") as file:
        file.write("{not json\n")
    table = pa.Table.from_pylist([{"messages": GOOD}, {"messages": [*GOOD, *GOOD[1:]]}])
    parquet = str(tmp_path / "b.parquet")
    pq.write_table(table, parquet)
    options = TokenizeOptions(64, "error")
    with open_or_check([path, parquet], tokenizer, options, tmp_path / "cache", num_proc) as found:
        errors = [str(error).replace(f"{tmp_path}/", "") for _, each in found.report.errors.by_kind() for error in each]
        assert len(found) == 3 and found.statistics.rows == 9
    starts = sorted(error.split(": ")[0] + " " + error.split(": ")[1] for error in errors)
    assert [start[:30] for start in starts] == [
        "a.jsonl:2 messages[0].role",
        "a.jsonl:3 messages[0].content",
        "a.jsonl:3 messages[1].loss",
        "a.jsonl:5 messages",
        "a.jsonl:6 messages",
        "a.jsonl:7 is not one valid JSO",
        "b.parquet:2 messages[2].role",
    ]
    assert not [item for item in (tmp_path / "cache").iterdir() if item.is_dir()]
    with pytest.raises(RowError, match=r"a\.jsonl:2: messages\[0\]\.role: is 'bot'"):  # training still refuses
        open_or_build([path, parquet], tokenizer, options, tmp_path / "cache", 1)


def test_files_that_cannot_be_read_do_not_hide_the_others(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path
) -> None:
    (tmp_path / "broken.parquet").write_text("no")
    (tmp_path / "cut.json").write_text(json.dumps([{"messages": GOOD}, {"messages": BAD_ROLE}])[:-1])
    silent = write_jsonl("silent.jsonl", question_answer("q", "a", loss=False))
    files = ["/nowhere/*.jsonl", *(str(tmp_path / name) for name in ("broken.parquet", "cut.json"))]
    files.append(write_jsonl("a.jsonl", GOOD, BAD_ROLE))
    train, val = check(datamodule(tokenizer, tmp_path, files, val_files=[silent]), 1, 1)
    assert [problem.split(" (")[0].split("; ")[0] for problem in train.problems] == [
        "no file matches '/nowhere/*.jsonl'",
        f"{tmp_path}/broken.parquet is not a Parquet file",
        f"{tmp_path}/cut.json:3: the file ends inside an array",
    ]
    assert train.wrong == 5 and dict(train.numbers)["samples"].startswith("2 ")
    assert val.wrong == 1 and "nothing to train on" in val.problems[0]
    assert "WRONG: train: no file matches" in text([train, val], tokenizer)


def test_thousands_are_counted_and_the_first_named(tokenizer: PreTrainedTokenizerFast) -> None:
    one, two = Findings(), Findings()
    for row in range(3000):
        (one if row < 2000 else two).add(RowError(f"f:{row}", f"messages[{row}].role", f"is {row}; it must be x"))
    one.update(Findings(json.loads(json.dumps(two.kinds))))
    ((count, errors),) = one.by_kind()
    assert count == len(one) == 3000 and [error.source for error in errors] == [f"f:{row}" for row in range(100)]
    (line, places, *_) = text([SetReport("train", errors=one)], tokenizer).splitlines()
    assert line == "WRONG, 3,000 rows: f:0: messages[0].role: is 0; it must be x"
    assert places == f"    also f:{', '.join(map(str, range(1, 13)))} and 2,987 more"
    for number in range(3 * findings.KINDS):  # data can make up kinds
        one.add(RowError("f:1", "", f"{number}"))
    assert len(one.kinds) == findings.KINDS + 1 and len(one) == 3000 + 3 * findings.KINDS


def test_a_terminal_holds_the_worst_report(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of more kinds, files, mixtures and sets than fit; each kind once for all sets, the most frequent first."""
    reports = []
    for number in range(9):
        errors, remarks = Findings(), Findings()
        for kind in range(40):
            for row in range(kind + 1):
                errors.add(RowError(f"f{number}:{row}", "messages", f"is wrong; kind {kind}"))
                remarks.add(RowError(f"f{number}:{row}", "messages", f"is odd; kind {kind}"))
        numbers = [(f"number {place}", "1") for place in range(30)]
        cuts = [Cut(2**power, 1, 1, 1, 99) for power in range(20)]
        problems, notes = [f"problem {place}" for place in range(30)], ["a note"] * 9
        name = f"val {number}" if number else "train"
        reports.append(SetReport(name, problems, errors, errors, [remarks, remarks], numbers, notes, cuts))
    lines = text(reports, tokenizer).splitlines()
    assert len(lines) < 59  # the verdict stands above
    wrong = [line for line in lines if line.startswith("WRONG, ")]
    assert wrong[0] == "WRONG, 360 rows: f0:0: messages: is wrong; kind 39" and len(set(wrong)) == 5
    assert "... and 35 more kinds, 5,670 rows; --html FILE lists them" in lines


def test_numbers_are_a_count_by_hand(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path) -> None:
    """Every `x` is one token: BOS, user, the question, assistant, the answer and the end of turn."""
    rows = [question_answer("x" * 1, "a"), question_answer("?", "a b c d e f g h i j"), question_answer("q " * 20, "a")]
    path = write_jsonl("a.jsonl", *rows, question_answer("q", "a", loss=False))
    data = datamodule(tokenizer, tmp_path, [path], max_length=8)
    (report,) = check(data, replicas=3, accumulation=5)
    numbers = dict(report.numbers)
    assert report.wrong == 0
    assert numbers["rows"] == "4" and numbers["turns"] == "8" and numbers["samples"].startswith("2 ")
    assert numbers["tokens"] == "14" and numbers["trained tokens"] == "6 (42.9%)"  # 6 + 8 tokens, 2 + 4 of them
    assert numbers["tokens per sample"] == "median 8, 90% 8, 99% 8, longest 26"
    assert numbers["cut to max_length"] == "1 sample" and numbers["dropped"] == "1 sample"
    assert numbers["without targets"] == "1 row"
    assert numbers["packed"] == "2 rows of up to 8 tokens, 87.5% full"
    assert numbers["optimizer steps"].startswith("1 per epoch, of 30 packed rows")
    # Before max_length, of 6, 15 and 26 tokens: what 8, 16 and 32 would cut, by hand.
    assert report.lengths == [(8, 1, 2, 25, 47), (16, 1, 1, 10, 47), (32, 1, 0, 0, 47)]
    assert [note.split(":")[0] for note in report.notes][0] == "1 row dropped, nothing to train on"
    (report,) = check(datamodule(tokenizer, tmp_path, [path]), replicas=None, accumulation=1)
    assert "optimizer steps" not in dict(report.numbers)


def test_copies_and_rows_of_train_in_val(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path
) -> None:
    """By what is trained on: the order of the fields is nothing, a turn without loss is."""
    swapped = [dict(reversed(message.items())) for message in GOOD]
    twice = question_answer("q", "a", reasoning_content="r") * 2  # two samples of one row
    masked = [*question_answer("q", "a"), *question_answer("q", "a")]
    first_masked = [masked[0], {**masked[1], "loss": False}, *masked[2:]]
    train_file = write_jsonl("a.jsonl", GOOD, twice, swapped, masked, first_masked, twice)
    val_file = write_jsonl("b.jsonl", question_answer("new", "a"), GOOD, question_answer("new", "a"))
    train, val = check(datamodule(tokenizer, tmp_path, [train_file], val_files=[val_file]), 1, 1)
    assert dict(train.numbers)["copies of another row"] == "2 rows"
    remarks = [str(error) for report in (train, val) for _, each in remarked(report) for error in each]
    assert [remark.split("; ")[0].replace(f"{tmp_path}/", "") for remark in remarks] == [
        "a.jsonl:3: trains on the same tokens as a.jsonl:1",
        "a.jsonl:6: trains on the same tokens as a.jsonl:2",
        "b.jsonl:2: trains on the same tokens as a.jsonl:1",
        "b.jsonl:3: trains on the same tokens as b.jsonl:1",
    ]
    assert dict(val.numbers)["also in train"] == "1 row" and train.wrong == val.wrong == 0


def test_what_nothing_reads_is_named_once_with_its_count(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Fields with text beside the messages, and fields of messages; numbers beside them say nothing, nulls neither."""
    rows: list[dict[str, Any]] = [
        {"messages": question_answer("q", f"{row}", name="x"), "id": row, "source": "web", "tags": [], "meta": None}
        for row in range(5)
    ]
    rows[1]["meta"] = {"lang": "en"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist([{"meta": None} | row for row in rows[::-1]]), tmp_path / "b.parquet")
    for name, first_meta in (("a.jsonl", 2), ("b.parquet", 4)):
        data = datamodule(tokenizer, tmp_path, [str(tmp_path / name)])
        (report,) = check(data, 1, 1)
        named = {errors[0].field: (count, errors[0].source, len(errors)) for count, errors in remarked(report)}
        path = f"{tmp_path}/{name}"
        assert named == {
            "source": (5, f"{path}:1", 1),
            "messages[].name": (5, f"{path}:1", 1),
            "meta": (1, f"{path}:{first_meta}", 1),
        }
        assert report.wrong == 0 and "suspicious, 5 rows: " in text([report], tokenizer)


def test_answers_without_a_word_are_remarked(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path
) -> None:
    silent = [question_answer("q", " "), question_answer("q", "<think>\nr\n</think>\n")]
    path = write_jsonl(
        "a.jsonl", *silent, question_answer("q", "", loss=False) + question_answer("q", "a", prefix=None)
    )
    (report,) = check(datamodule(tokenizer, tmp_path, [path]), 1, 1)
    ((count, errors),) = remarked(report)
    assert count == 2 and [(error.source, error.field) for error in errors] == [
        (f"{path}:{row}", "messages[1].content") for row in (1, 2)
    ]


def test_turns_beside_a_system_prompt_are_counted_as_in_the_file(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [
        {"messages": question_answer("q", ""), "system": "s"},
        {"messages": question_answer("q", "<｜User｜>"), "system": "s"},
        {"messages": question_answer("q", "a"), "system": "<｜User｜>"},
        {"messages": ["hi"], "system": "s", "tools": [{}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (report,) = check(datamodule(tokenizer, tmp_path, [str(tmp_path / "a.jsonl")]), 1, 1)
    found = [error for _, errors in [*remarked(report), *report.errors.by_kind()] for error in errors]
    assert [(error.source[-1], error.field) for error in found] == [
        ("1", "messages[1].content"),
        ("2", "messages[1].content"),
        ("3", "system"),
        ("4", "messages[0]"),
    ]


def test_bad_rows_can_be_skipped(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path) -> None:
    path = write_jsonl("a.jsonl", GOOD, BAD_ROLE, BAD_TWICE, question_answer("q", "b"))
    with open(path, "a") as file:
        file.write('{"messages": \n')
    data = datamodule(tokenizer, tmp_path, [path], val_files=[path], bad_rows="skip")
    reports = check(data, 1, 1)
    assert all(report.wrong == 0 and dict(report.numbers)["skipped"] == "3 rows" for report in reports)
    assert len(reports[0].skipped) == 4 and "skipped, 2 rows: " in text(reports, tokenizer)
    data.setup("fit")
    assert data.train_set is not None and data.train_set.facts()["skipped"] == 3
    (note,) = reports[0].notes
    assert note == f"3 bad rows skipped, listed in {data.train_set.cache.directory / 'skipped.jsonl'}"
    listed = [json.loads(line) for line in (data.train_set.cache.directory / "skipped.jsonl").read_text().splitlines()]
    assert [(line["row"].removeprefix(f"{path}:"), line["field"]) for line in listed] == [
        ("2", "messages[0].role"),
        ("3", "messages[0].content"),
        ("3", "messages[1].loss"),
        ("5", ""),
    ]
    with pytest.raises(RowError, match=r"a\.jsonl:2"):  # the option is part of what a cache is
        datamodule(tokenizer, tmp_path, [path]).prepare_data()
    only_bad = datamodule(tokenizer, tmp_path, [write_jsonl("b.jsonl", BAD_ROLE)], bad_rows="skip")
    (report,) = check(only_bad, 1, 1)
    assert report.wrong == 1 and "nothing to train on. 1 row " in report.problems[0]
    (tmp_path / "cut.json").write_text(json.dumps([{"messages": GOOD}])[:-1])  # what is no row is not skipped
    (report,) = check(datamodule(tokenizer, tmp_path, [str(tmp_path / "cut.json")], bad_rows="skip"), 1, 1)
    assert report.wrong == 1


def test_rows_have_the_names_of_the_files_at_hand(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path
) -> None:
    """A cache is found by content; what it says of rows was written under other names."""
    for name in ("a:1.jsonl", "b.jsonl"):
        path = write_jsonl(name, question_answer("q", ""), question_answer("q", "a", loss=False))
        (report,) = check(datamodule(tokenizer, tmp_path, [path]), 1, 1)
        assert [errors[0].source for _, errors in remarked(report)] == [f"{path}:1"]
        assert report.notes == [f"1 row dropped, nothing to train on: {path}:2"]


def test_halves_of_characters_can_be_reported(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    half = "\ud83d"
    rows = [{half: "x"}, {"messages": question_answer(half, half)}, {"messages": [{"role": half}]}, {"messages": half}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reports = check(datamodule(tokenizer, tmp_path, [str(tmp_path / "a.jsonl")]), 1, 1)
    assert {error.source[-1] for _, errors in reports[0].errors.by_kind() for error in errors} == set("1234")
    (text(reports, tokenizer) + page(reports, tokenizer, "data")).encode()


def test_fit_opens_what_the_check_built(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("a.jsonl", GOOD, question_answer("q", "<think>r</think>"))
    first = check(datamodule(tokenizer, tmp_path, [path]), 1, 1)
    monkeypatch.setattr(cache_build.CacheBuild, "tokenize", lambda *args, **kwargs: pytest.fail("tokenised again"))
    data = datamodule(tokenizer, tmp_path, [path])
    data.prepare_data()
    data.setup("fit")
    assert data.train_set is not None and len(data.train_set.cache) == 2
    again = check(data, 1, 1)  # what the check says does not depend on who built the cache
    assert text(again, tokenizer) == text(first, tokenizer) and "has no answer" in text(again, tokenizer)


def test_shown_is_what_is_trained(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path) -> None:
    rows = [question_answer("问🙂", "答🙂\x1b[31m", reasoning_content="r") * 2, question_answer("not", "shown"), GOOD]
    (report,) = check(datamodule(tokenizer, tmp_path, [write_jsonl("a.jsonl", *rows)]), 1, 1, show=2)
    template = ChatTemplate(tokenizer)
    samples = [sample for row in rows[::2] for sample in template.render(row)]
    assert len(report.shown) == len(samples) == 3
    for document, sample in zip(report.shown, samples, strict=True):
        trained = [tokenizer.decode(sample.input_ids[start:stop]) for start, stop in sample.target_spans]
        plain = show(document, tokenizer, colour=False)
        assert [part.split("⟧")[0] for part in plain.split("⟦")[1:]] == [
            part.replace("\x1b", "\\x1b") for part in trained
        ]
        assert plain.replace("⟦", "").replace("⟧", "") == tokenizer.decode(sample.input_ids).replace("\x1b", "\\x1b")
        assert "\x1b" not in plain and "\ufffd" not in plain
    coloured = show(report.shown[2], tokenizer, colour=True)
    assert "\x1b[7m<｜Assistant｜>\x1b[0m\x1b[32ma\x1b[0m\x1b[32m\x1b[7m<｜end▁of▁sentence｜>\x1b[0m" in coloured


def test_what_is_shown_is_spread_over_the_set(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path
) -> None:
    path = write_jsonl("a.jsonl", *(question_answer("q", f"{row}") for row in range(9)))
    for count, places in ((0, []), (1, [1]), (3, [1, 5, 9]), (20, list(range(1, 10)))):
        (report,) = check(datamodule(tokenizer, tmp_path, [path]), 1, 1, show=count)
        assert [document.source for document in report.shown] == [f"{path}:{place}" for place in places]


def test_first_of_equal_digests() -> None:
    digests = np.array([[5, 1], [7, 0], [5, 1], [5, 2], [0, 9], [7, 0], [5, 1]], dtype=np.int64)
    assert firsts(digests).tolist() == [0, 1, 0, 3, 4, 1, 0]


def test_the_mixture_and_named_sets(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path) -> None:
    rows = [question_answer("q", f"a{row}") for row in range(6)]
    train = [write_jsonl("a.jsonl", *rows[:2]), write_jsonl("b.jsonl", *rows[2:])]
    sets = {"new": [write_jsonl("new.jsonl", GOOD, GOOD)], "leaky": [write_jsonl("leaky.jsonl", rows[3], GOOD)]}
    more: dict[str, Any] = {"packing": False, "val_sets": sets}
    reports = check(datamodule(tokenizer, tmp_path, train, train_weights=[3, 0.5], **more), 1, 1)
    assert [report.name for report in reports] == ["train", "val new", "val leaky"]
    assert all(report.wrong == 0 for report in reports)
    numbers = dict(reports[0].numbers)
    names = [f"…{path[-39:]}" for path in train]
    assert numbers[f"3 x {names[0]}"].startswith("6 rows per epoch, of 2; 42 tokens (75.0%), 18 trained (75.0%)")
    assert numbers[f"0.5 x {names[1]}"].startswith("2 rows per epoch, of 4; 14 tokens (25.0%)")
    assert numbers["optimizer steps"].startswith("4 per epoch, of 2 packed rows")
    assert [dict(report.numbers)["also in train"] for report in reports[1:]] == ["0 rows", "1 row"]
    assert [dict(report.numbers)["copies of another row"] for report in reports[1:]] == ["1 row", "0 rows"]
    assert f"3 x {names[0]}" in text(reports, tokenizer)
    (train_report, *_) = check(datamodule(tokenizer, tmp_path, train, train_weights=[0.1, 1], **more), 1, 1)
    assert train_report.wrong == 1 and "0.1 of the 2 packed rows" in train_report.problems[0]


def test_a_character_that_is_cut_through_is_no_garbage(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("a𒐫", add_special_tokens=False)
    assert len(ids) > 2 and "\ufffd" in tokenizer.decode(ids[:-1])
    document = Document(np.asarray(ids[:-1], dtype=np.int32), np.asarray([[0, len(ids) - 1]], dtype=np.int32), "f:1")
    assert [segment.text for segment in segments(document, tokenizer)] == ["a…"]


def test_the_page_escapes_what_the_data_says(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path
) -> None:
    evil = "<script>alert('x')</script>&amp;"
    path = write_jsonl("a<b.jsonl", question_answer(evil, evil), [{"role": evil, "content": ""}])
    reports = check(datamodule(tokenizer, tmp_path, [path]), 1, 1, show=5)
    html = page(reports, tokenizer, "data")
    assert "<script" not in html and "src=" not in html and "http" not in html
    seen: list[tuple[str | None, str]] = []
    tags: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta",):
                tags.append(tag)
            seen.append((tag, ""))

        def handle_endtag(self, tag: str) -> None:
            assert tags.pop() == tag

        def handle_data(self, data: str) -> None:
            seen.append((tags[-1] if tags else None, data))

    Parser().feed(html)
    assert not tags
    assert ("mark", evil) in seen and ("pre", evil) in seen  # the answer, trained on, and the question
    assert any(tag == "li" and f"a<b.jsonl:2: messages[0].role: is {evil!r}" in data for tag, data in seen)
    assert {"svg", "rect", "table"} <= {tag for tag, _ in seen} and "1 problem: training would refuse" in html
