import json
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from src.datamodules import cache as module
from src.datamodules import cache_build, reader
from src.datamodules.cache import TokenCache, default_cache_dir, open_built, open_or_build, open_or_check
from src.datamodules.cache_build import CacheBuild
from src.datamodules.chat_template import ChatTemplate
from src.datamodules.reader import FileScan
from src.datamodules.row_account import Statistics
from src.datamodules.rows import RowError
from src.datamodules.tokenization import TokenizeOptions
from src.errors import UserError

from .conftest import question_answer

Write = Callable[..., str]
OPTIONS = TokenizeOptions(max_length=64)


def contents(cache: TokenCache) -> list[tuple[list[int], list[list[int]], str]]:
    documents = [cache.document(index) for index in range(len(cache))]
    return [(doc.input_ids.tolist(), doc.target_spans.tolist(), Path(doc.source).name) for doc in documents]


def test_documents_are_the_rendered_rows(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path
) -> None:
    first = [*question_answer("q", "a", reasoning_content="r"), *question_answer("2", "b")]
    path = write_jsonl("a.jsonl", first, question_answer("问", "答"))
    cache = open_or_build([path], tokenizer, OPTIONS, tmp_path / "cache")
    template = ChatTemplate(tokenizer)
    samples = [*template.render(first), *template.render(question_answer("问", "答"))]
    assert contents(cache) == [
        (sample.input_ids, [list(span) for span in sample.target_spans], source)
        for sample, source in zip(samples, ["a.jsonl:1", "a.jsonl:1", "a.jsonl:2"], strict=True)
    ]
    targets = [stop - start for sample in samples for start, stop in sample.target_spans]
    assert cache.lengths.tolist() == [len(sample.input_ids) for sample in samples]
    assert cache.targets.tolist() == cache.mtp_targets.tolist() == targets
    assert cache.document(0).input_ids.dtype == np.int32
    assert cache.statistics == Statistics(
        rows=2,
        turns=6,
        samples=3,
        tokens=int(cache.lengths.sum()),
        targets=sum(targets),
        longest=max(len(sample.input_ids) for sample in samples),
        whole=cache.statistics.whole,
    )
    assert sum(count for count, _ in cache.statistics.whole.values()) == 3


def test_samples_do_not_depend_on_processes_or_spans_or_format(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations = [question_answer(f"{number}?", "!" * number) for number in range(1, 12)]
    path = write_jsonl("a.jsonl", *conversations)
    expected = contents(open_or_build([path], tokenizer, OPTIONS, tmp_path / "one", num_proc=1))
    monkeypatch.setattr(reader, "ROWS_PER_SPAN", 3)
    cache = open_or_build([path], tokenizer, OPTIONS, tmp_path / "two", num_proc=2)
    assert contents(cache) == expected and cache.statistics.rows == 11
    table = pa.Table.from_pylist([{"messages": messages} for messages in conversations])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    parquet = contents(open_or_build([str(tmp_path / "a.parquet")], tokenizer, OPTIONS, tmp_path / "three"))
    assert [item[:2] for item in parquet] == [item[:2] for item in expected]


def test_tokenised_once_for_the_same_bytes_and_options(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[Path] = []
    build = module._build

    def counted(what: CacheBuild) -> None:
        builds.append(what.directory)
        build(what)

    monkeypatch.setattr(module, "_build", counted)
    path, copy = (write_jsonl(name, question_answer("q", "a")) for name in ("a.jsonl", "b.jsonl"))
    where = tmp_path / "cache"
    open_or_build([path], tokenizer, OPTIONS, where)
    assert open_or_build([copy], tokenizer, OPTIONS, where).document(0).source == f"{copy}:1"
    assert len(builds) == 1
    open_or_build([path, copy], tokenizer, OPTIONS, where)
    open_or_build([path], tokenizer, TokenizeOptions(63), where)
    open_or_build([path], tokenizer, TokenizeOptions(64, fields={"id": None}), where)
    open_or_build([path], tokenizer, TokenizeOptions(64, format="messages"), where)
    open_or_build([path], tokenizer, TokenizeOptions(64, bad_rows="skip"), where)
    open_or_build([path], tokenizer, TokenizeOptions(64, history_reasoning="strip"), where)
    open_or_build([path], tokenizer, TokenizeOptions(64, control_tokens="keep"), where)
    open_or_build([path], tokenizer, TokenizeOptions(64, chat_template_kwargs={"thinking": True}), where)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", f"{tokenizer.chat_template}{{# new #}}")
        open_or_build([path], tokenizer, OPTIONS, where)
    write_jsonl("a.jsonl", question_answer("q", "b"))
    os.utime(path, ns=(1, 1))
    changed = open_or_build([path], tokenizer, OPTIONS, where)
    assert len(builds) == len(set(builds)) == 11
    assert tokenizer.decode(changed.document(0).input_ids).endswith("b<｜end▁of▁sentence｜>")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_other_text_of_the_same_size_and_time_is_another_cache(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As rsync -t, tar and object stores leave it."""
    path, shown = tmp_path / f"a.{kind}", []
    for answer in ("yes", "no.", "yes"):
        rows = [{"messages": question_answer("q", answer)}]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text(json.dumps(rows if kind == "json" else rows[0]))
        os.utime(path, ns=(1, 1))
        cache = open_or_build([str(path)], tokenizer, OPTIONS, tmp_path / "cache")
        shown.append((path.stat().st_size, cache.fingerprint, tokenizer.decode(cache.document(0).input_ids)))
    assert len({size for size, *_ in shown}) == 1
    assert [text.split("<｜Assistant｜>")[1] for *_, text in shown] == [
        f"{answer}<｜end▁of▁sentence｜>" for answer in ("yes", "no.", "yes")
    ]
    assert shown[0] == shown[2] != shown[1]


def test_a_file_that_changes_while_it_is_read_leaves_no_cache(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("a.jsonl", question_answer("q", "a"))
    scan = cache_build.scan

    def changing(name: str) -> FileScan:
        found = scan(name)
        write_jsonl("a.jsonl", question_answer("q", "b"))
        return found

    monkeypatch.setattr(cache_build, "scan", changing)
    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was read; start again"):
        open_or_build([path], tokenizer, OPTIONS, tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_another_process_opened_is_opened_without_reading_the_files(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path
) -> None:
    path = write_jsonl("a.jsonl", question_answer("q", "a"))
    fingerprint = open_or_build([path], tokenizer, OPTIONS, tmp_path).fingerprint
    Path(path).unlink()
    assert open_built(fingerprint, [path], tmp_path).source(0) == f"{path}:1"
    with pytest.raises(
        ValueError, match=r"has no .*/other, the tokens that the first rank trains on.*a\.jsonl must be"
    ):
        open_built("other", [path], tmp_path)


def test_overlong(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path) -> None:
    long_answer, long_question = question_answer("q", "a b c d e f g h i j"), question_answer("q " * 20, "a")
    path = write_jsonl("a.jsonl", question_answer("q", "a"), long_answer, long_question)
    cut = open_or_build([path], tokenizer, TokenizeOptions(8), tmp_path)
    assert cut.lengths.tolist() == [6, 8] and cut.targets.tolist() == [2, 4]
    assert cut.document(1).target_spans.tolist() == [[4, 8]]
    assert (cut.statistics.truncated, cut.statistics.dropped_truncated) == (1, 1)
    dropped = open_or_build([path], tokenizer, TokenizeOptions(8, "drop"), tmp_path)
    assert dropped.lengths.tolist() == [6] and dropped.statistics.dropped_overlong == 2
    with pytest.raises(ValueError, match=r"a\.jsonl:2: messages: renders to 15 tokens, above max_length 8; shorten"):
        open_or_build([path], tokenizer, TokenizeOptions(8, "error"), tmp_path)


def test_rows_without_targets_are_dropped_and_named(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = question_answer("q", "a", loss=False)
    path = write_jsonl("a.jsonl", question_answer("q", "a"), *[silent] * 7, [{"role": "user", "content": "q"}])
    monkeypatch.setattr(reader, "ROWS_PER_SPAN", 3)
    statistics = open_or_build([path], tokenizer, OPTIONS, tmp_path).statistics
    assert (statistics.rows, statistics.samples, statistics.rows_without_targets) == (9, 1, 8)
    named = ", ".join(f"{path}:{row}" for row in range(2, 7))
    assert statistics.lines(OPTIONS.max_length)[1] == f"8 rows dropped, nothing to train on: {named}, ..."
    with pytest.raises(ValueError, match=r"b\.jsonl: nothing to train on.*1 row dropped.*assistant turn without loss"):
        open_or_build([write_jsonl("b.jsonl", silent)], tokenizer, OPTIONS, tmp_path)
    with pytest.raises(ValueError, match=r"c\.jsonl has no rows; leave it out"):
        open_or_build([write_jsonl("c.jsonl")], tokenizer, OPTIONS, tmp_path)


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("first_bad", [1, 3])
def test_a_malformed_row_is_one_error_and_leaves_no_cache(
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_proc: int,
    first_bad: int,
) -> None:
    monkeypatch.setattr(reader, "ROWS_PER_SPAN", 2)
    good, bad = question_answer("q", "a"), question_answer("q", "a", loss="yes")
    path = write_jsonl("a.jsonl", *[good] * (first_bad - 1), bad, bad, good)
    with pytest.raises(RowError, match=rf"a\.jsonl:{first_bad}: messages\[1\]\.loss: is 'yes'; it must be true, false"):
        open_or_build([path], tokenizer, OPTIONS, tmp_path / "cache", num_proc)
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} <= {".lock", ""}
    assert not [file for file in (tmp_path / "cache").iterdir() if file.is_dir()]


def test_what_the_template_refuses_is_named(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = "{% if messages | length > 4 %}{{ raise_exception('too long') }}{% endif %}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    path = write_jsonl("a.jsonl", question_answer("q", "a"), question_answer("q", "a") * 3)
    with pytest.raises(RowError, match=r"a\.jsonl:2: messages: the chat template refuses the conversation: too long"):
        open_or_build([path], tokenizer, OPTIONS, tmp_path / "cache")


RAISING = {
    "ZeroDivisionError": "{{ 1 // 0 }}",
    "TypeError": "{{ 1 + messages }}",
    "has no element": "{{ messages[9].content }}",
    "OverflowError": "{{ 'x' * (10 ** 30) }}",
    "RecursionError": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "ValueError": "{{ '%q' | format(1) }}",
}


@pytest.mark.parametrize(("error", "raising"), RAISING.items())
def test_whatever_a_template_raises_is_its_rows_error_and_the_others_are_looked_at(
    error: str,
    raising: str,
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    condition = "{% if messages[-1]['content'] == 'odd' %}" + raising + "{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", condition + str(tokenizer.chat_template))
    rows = [question_answer(question, "a") for question in ("q", "odd", "p")]
    path = write_jsonl("a.jsonl", *rows, [{"role": "bot"}])
    with open_or_check([path], tokenizer, OPTIONS, tmp_path / "cache") as found:
        errors = [str(each) for _, errors in found.report.errors.by_kind() for each in errors]
        assert len(errors) == len(found) == 2 and errors[1].startswith(f"{path}:4: messages[0].role")
        assert re.match(rf"{path}:2: messages: .*({error})", errors[0])
    with pytest.raises(RowError, match=r"a\.jsonl:2: messages: "):
        open_or_build([path], tokenizer, OPTIONS, tmp_path / "cache")


def test_a_row_on_which_a_library_fails_is_named(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = ChatTemplate._encode

    def failing(self: ChatTemplate, text: str) -> list[int]:
        if "odd" in text:
            raise KeyError("odd")
        return encode(self, text)

    monkeypatch.setattr(ChatTemplate, "_encode", failing)
    path = write_jsonl("a.jsonl", question_answer("q", "a"), question_answer("q", "odd"))
    with pytest.raises(RowError, match=r"a\.jsonl:2: messages: cannot be rendered \(KeyError: 'odd'\)"):
        open_or_build([path], tokenizer, OPTIONS, tmp_path)


SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}]}
ALPACA = {"instruction": "q", "output": "c"}


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("second", [SHAREGPT, ALPACA])
def test_rows_of_two_formats_in_a_file_are_an_error_that_names_the_option(
    second: dict[str, Any],
    num_proc: int,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However far they are from each other, and not where they are in two files."""
    monkeypatch.setattr(reader, "ROWS_PER_SPAN", 1)
    first, where = {"messages": question_answer("q", "a")}, tmp_path / "cache"
    paths = [str(tmp_path / name) for name in ("mixed.jsonl", "first.jsonl", "second.jsonl")]
    for path, rows in zip(paths, ([first, first, second], [first], [second]), strict=True):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = r"messages \(.*mixed\.jsonl:1\) and (sharegpt|alpaca) \(.*mixed\.jsonl:3\); give one with --data\.format"
    for options in (OPTIONS, TokenizeOptions(64, bad_rows="skip")):
        with pytest.raises(ValueError, match=names):
            open_or_build(paths[:1], tokenizer, options, where, num_proc)
        with open_or_check(paths[:1], tokenizer, options, where, num_proc) as found:
            assert len(found) == 3 and len(found.report.problems) == 1
    assert len(open_or_build(paths[1:], tokenizer, OPTIONS, where)) == 2
    with pytest.raises(RowError, match=r"mixed\.jsonl:3: messages: is missing"):
        open_or_build(paths[:1], tokenizer, TokenizeOptions(64, format="messages"), where)


def test_a_system_prompt_and_mapped_thinking_are_trained_on(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [
        {"messages": question_answer("q", "a", thinking="r"), "system": "s"},
        {"conversations": SHAREGPT["conversations"], "system": "s"},
    ]
    template = ChatTemplate(tokenizer)
    wanted = [
        template.render([{"role": "system", "content": "s"}, *messages])[0].input_ids
        for messages in (question_answer("q", "a", reasoning_content="r"), question_answer("q", "b"))
    ]
    for index, row in enumerate(rows):
        (tmp_path / "a.json").write_text(json.dumps([row]))
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        for name in ("a.json", "a.parquet"):
            options = TokenizeOptions(64, fields={"thinking": "reasoning_content"})
            cache = open_or_build([str(tmp_path / name)], tokenizer, options, tmp_path / "cache")
            assert cache.document(0).input_ids.tolist() == wanted[index]


def test_an_interrupted_build_leaves_nothing_that_looks_complete(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, where = write_jsonl("a.jsonl", question_answer("q", "a")), tmp_path / "cache"

    def killed() -> None:
        monkeypatch.setattr(Path, "rename", lambda self, target: os._exit(9))  # no clean-up, as by kill -9
        open_or_build([path], tokenizer, OPTIONS, where)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == 9
    (left,) = where.glob("*.building-*")
    assert len(open_or_build([path], tokenizer, OPTIONS, where)) == 1
    assert not left.exists()


def test_several_processes_at_once_build_once(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = write_jsonl("a.jsonl", question_answer("q", "a")), tmp_path / "builds"
    build = module._build

    def logged(what: CacheBuild) -> None:
        with log.open("a") as file:
            file.write("build\n")
        build(what)

    monkeypatch.setattr(module, "_build", logged)
    context = multiprocessing.get_context("fork")
    arguments = ([path], tokenizer, OPTIONS, tmp_path / "cache")
    processes = [context.Process(target=open_or_build, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "build\n"


def test_the_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/deepseek-sft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert default_cache_dir() == Path("/home/user/.cache/deepseek-sft")


def test_the_manifest_is_readable(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path) -> None:
    cache = open_or_build([write_jsonl("a.jsonl", question_answer("q", "a"))], tokenizer, OPTIONS, tmp_path)
    manifest = json.loads((tmp_path / cache.fingerprint / "manifest.json").read_text())
    assert manifest["max_length"] == 64 and manifest["statistics"]["samples"] == 1


def test_a_damaged_cache_is_named(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path) -> None:
    paths = [write_jsonl("a.jsonl", question_answer("q", "a"))]
    cache = open_or_build(paths, tokenizer, OPTIONS, tmp_path / "cache").directory
    for file in (cache / "manifest.json", *cache.glob("*.arrow")):
        whole = file.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"[]", b'{"files": 3}'):
            file.write_bytes(content)
            with pytest.raises(UserError, match=f"the token cache {cache} is damaged, .*: remove it"):
                TokenCache(cache, paths)
        file.unlink()
        with pytest.raises(UserError, match=f"the token cache {cache} is damaged, .*: remove it"):
            TokenCache(cache, paths)
        file.write_bytes(whole)
    assert len(TokenCache(cache, paths)) == 1
