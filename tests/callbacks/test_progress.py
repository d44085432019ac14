"""What a person sees of a run: a bar in a terminal, plain lines in a log."""

import io
import re
import sys
from typing import Any

import pytest

from src.callbacks.progress import Progress, figures
from tests.test_pages import pasted, shape

from .stub import STEPS, Stub, train


class Watched(Stub):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.log("train/tokens_per_second", 12_345.6)


def test_a_log_gets_a_line_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    train(Watched(), Progress(), validate=True, log_every_n_steps=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert re.fullmatch(r"step 2/4  loss 2\.0000  12,346 tokens/s  left 0:00:\d\d", lines[0])
    assert lines[1:] == [
        "step 4/4  loss 4.0000  12,346 tokens/s  left 0:00:00",
        "step 4  val/loss 0.5000",
    ]
    page = shape(pasted("docs/watching.md", "step 3/6"))
    assert page == shape("\n".join([lines[0], *lines[1:]]))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_of_optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    train(Watched(), Progress())
    last = [shown for shown in terminal.getvalue().split("\r") if shown.strip()][-1]
    assert f"step {STEPS}/{STEPS} |" in last and last.rstrip().endswith(", loss 4.0000  12,346 tokens/s")


def test_figures_are_those_that_were_logged() -> None:
    metrics = {"memory/peak_gib": 61.34, "train/mfu": 0.4123, "train/loss": 1.23456, "val/loss": 7}
    assert figures(metrics) == ["loss 1.2346", "MFU 41.2%", "61.3 GiB"]
