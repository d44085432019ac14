"""`check-data` as users run it."""

import json
from pathlib import Path

from tests.command import Completed, run, start_afresh
from tests.test_pages import pasted

CONFIG = "--config=configs/tiny_cpu.yaml"


def check_data(folder: Path, *args: str) -> Completed:
    return run("check-data", CONFIG, f"--data.cache_dir={folder}/cache", *args, check=False)


def test_sound_data_exits_with_0(tmp_path: Path) -> None:
    """With every argument of fit, none of which is followed: there is no such checkpoint, and no weights are needed."""
    result = start_afresh(
        "check-data",
        CONFIG,
        f"--data.cache_dir={tmp_path}/cache",
        "--show=1",
        f"--html={tmp_path}/page.html",
        "--ckpt_path=last",
        "--model.from_scratch=false",
        "--trainer.devices=8",
        f"--trainer.default_root_dir={tmp_path}/run",
    )
    assert "nothing is wrong" in result.stdout and "data parallel 4 x batch 1" in result.stdout
    assert "⟦<think>" in result.stdout and "\x1b" not in result.stdout  # no terminal, no colour
    assert "<mark>" in (tmp_path / "page.html").read_text() and not (tmp_path / "run").exists()


def test_the_page_has_the_report_on_the_demos_data(tmp_path: Path) -> None:
    result = check_data(tmp_path, "--trainer.devices=2")
    assert result.stdout == pasted("docs/data.md", "nothing is wrong")


def test_the_page_has_what_weights_come_to(tmp_path: Path) -> None:
    files = "--data.train_files=[data/demo/val.jsonl, data/demo/train.jsonl]"
    result = check_data(tmp_path, files, "--data.train_weights=[2, 0.5]", "--data.val_files=null")
    assert pasted("docs/data.md", "  2 x ") in result.stdout


def test_all_that_is_wrong_is_listed_and_exits_with_1(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "bot", "content": ""}]}, {"rows": 1}]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"--data.train_files=[{tmp_path}/bad.jsonl]", "--data.val_files=[/nowhere.jsonl]"]
    result = check_data(tmp_path, *files, "--trainer.devices=3", "--data.max_length=8192")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for problem in (
        "bad.jsonl:1: messages[0].role: is 'bot'",
        "bad.jsonl:2: messages: is missing (fields: rows)",
        "nothing to train on",
        "no file matches '/nowhere.jsonl'",
        "WORLD_SIZE 3",
        "above the model's max_position_embeddings 4096",
        "6 problems: training would refuse this data",
    ):
        assert problem in result.stdout, problem


def test_without_a_tokenizer_or_with_wrong_weights_there_is_one_error(tmp_path: Path) -> None:
    result = check_data(tmp_path, f"--data.tokenizer={tmp_path}")
    assert result.returncode == 1 and "Traceback" not in result.stderr and not result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith(f"check-data: tokenizer '{tmp_path}': no tokenizer.json")
    result = check_data(tmp_path, "--data.train_weights=[1, 2]", "--data.val_sets={more: [data/demo/val.jsonl]}")
    assert "check-data: data.train_weights has 2 values, data.train_files 1 entry" in result.stderr


def test_help(tmp_path: Path) -> None:
    result = check_data(tmp_path, "--help")
    assert result.returncode == 0 and "--show" in result.stdout and "--data.max_length" in result.stdout
