"""README and docs: their commands are accepted as printed, and README's own-data example runs from its own text.

tests/launch/test_slurm.py runs README's job on a cluster and the overview's dry run.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from src.commands.early import read
from tests.command import ROOT, run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("python", "sbatch", "srun", "bash", "torchrun")
# What stands for a value in a page's command, and a value.
PLACEHOLDERS = {
    "CONFIG": "configs/tiny_cpu.yaml",
    "mine.yaml": "configs/32n_sp4.yaml",
    "CHECKPOINT": "runs/x/checkpoints/last.ckpt",
    "DIR": "hf",
    "FILE": "file",
    "F": "file",
    "N": "3",
    "bf16|fp8|fp32": "fp8",
    "JOB": "1",
}
STARTS = re.compile(rf"(?:\w+=\S+ )*(?:{'|'.join(COMMANDS)}) |\w+=\"")


def blocks(page: Path, language: str = "") -> list[str]:
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for of, text in fenced if of == language]


def shape(text: str) -> list[str]:
    """The lines without what a machine, a run or a folder decides: numbers, times, digests, all but a path's name."""
    text = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7,40}\b(\+changes)?|\bnone(?=, torch)", "0", text)
    text = re.sub(r"(?<!\w)(?:\.\.\.)?/(?:[^\s/]+/)*(?=[^\s/]+)", "", text)
    text = re.sub(r"\d(?:[\w.,:+-]*\w)?%?", "0", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def pasted(page: str, start: str) -> str:
    """The block of a page, without a language, that has a line beginning with `start`."""
    (block,) = [text for text in blocks(ROOT / page) if re.search(rf"^{re.escape(start)}", text, re.MULTILINE)]
    return block


def lines(block: str) -> list[str]:
    """The commands of a block, without what they print; options in brackets are given."""
    whole = re.sub(r" *\\\n *", " ", block).splitlines()
    prompted = [line.removeprefix("$ ") for line in whole if line.startswith("$ ")]
    commands = [line for line in prompted or whole if STARTS.match(line)]
    commands = [re.sub(r"\[(--[^\]]*)\]", r"\1", line).replace(" ... ", " --config CONFIG ") for line in commands]
    for placeholder, value in PLACEHOLDERS.items():
        commands = [re.sub(rf"(?<![\w/]){re.escape(placeholder)}(?![\w/=])", value, line) for line in commands]
    return commands


def calls(commands: list[str], folder: Path) -> list[list[str]]:
    """What a shell makes of them: each command's words."""
    folder.mkdir()
    for name in COMMANDS:
        stub = folder / name
        stub.write_text('#!/bin/sh\n{ printf "%s\\0" "${0##*/}" "$@"; printf "\\n\\0"; } >>"$CALLS"\n')
        stub.chmod(0o755)
    (folder / "script").write_text("\n".join(commands))
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    subprocess.run(["/bin/bash", "-eu", folder / "script"], env=environment, check=True, timeout=60)
    words = (folder / "calls").read_text(encoding="utf-8").split("\0")[:-1]
    return [call.split("\0") for call in "\0".join(words).replace("\0\n", "\n").split("\n")[:-1] if call.strip("\0")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_accepted(page: Path, tmp_path: Path) -> None:
    commands = [line for block in blocks(page) for line in lines(block)]
    called = calls(commands, tmp_path / "stubs") if commands else []
    assert len(called) >= (12 if page.stem == "README" else 0)
    for words in called:
        words = [word for word in words if word]
        if "src.cli" in words:
            command, *arguments = words[words.index("src.cli") + 1 :]
        elif script := next((word for word in words if word.endswith(("fit.sbatch", "fit.sh"))), None):
            config, *arguments = words[words.index(script) + 1 :]
            command, arguments = "fit", ["--config", config, *arguments]
        else:
            scripts = [word for word in words[1:] if word.endswith((".py", ".sh", ".sbatch"))]
            assert all((ROOT / script).is_file() for script in scripts), words
            continue
        switches = {"--layout-only": "--layout_only=true"}
        read(command, [switches.get(word, word) for word in arguments])  # exits where one is refused


def test_readmes_own_data_is_trained_exported_and_asked(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    (row,), (config, *_) = blocks(readme, "json"), blocks(readme, "yaml")
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps(json.loads(row)) + "\n" for _ in range(2)))
    settings = yaml.safe_load(config)
    settings["config"] = str(ROOT / settings["config"])
    settings["trainer"]["default_root_dir"] = str(tmp_path / "run")
    settings["data"] |= {"train_files": [str(rows)], "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--config", str(tmp_path / "mine.yaml")]
    assert "nothing is wrong" in run("check-data", *arguments).stdout
    run("fit", *arguments, ranks=2)
    run("export", "--ckpt", str(tmp_path / "run/checkpoints/last.ckpt"), "--out", str(tmp_path / "hf"))
    question = json.loads(row)["messages"][0]["content"]
    result = run(str(tmp_path / "hf"), "--prompt", question, "--max_new_tokens", "2", module="scripts.sample")
    assert "every tensor in its place" in result.stdout and question in result.stdout
