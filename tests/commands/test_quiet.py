"""The log of a run has what the run says; libraries' chatter is gone, their warnings are not."""

import io
import logging
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm

from src.commands.quiet import LOGGED, BesideBars, silence
from tests.command import start_afresh
from tests.commands.test_cli import fit_args


def test_a_fit_says_nothing_that_nobody_can_act_on(inputs: Path, tmp_path: Path) -> None:
    result = start_afresh(*fit_args(inputs, tmp_path, "--trainer.max_steps=1"))
    said = result.stderr + result.stdout
    for chatter in (
        "litlogger",
        "LeafSpec",
        "accelerator to CPU",
        "`weights_only`",
        "srun",
        "TPU",
        "[rank: 1] Seed",
        "built successfully",
        "Params",
        "%|",
    ):
        assert chatter not in said, chatter
    assert "Seed set to 0" in said and "step=1.ckpt" in said


def test_other_messages_of_the_same_loggers_pass(caplog: pytest.LogCaptureFixture) -> None:
    for name in LOGGED:
        logger = logging.getLogger(name)
        filters, propagate = list(logger.filters), logger.propagate
        try:
            silence()
            logger.propagate = True
            logger.warning("something else than %s", "chatter")
            assert caplog.messages[-1] == "something else than chatter"
        finally:
            logger.filters, logger.propagate = filters, propagate
    with warnings.catch_warnings(record=True) as caught:
        silence()
        warnings.warn("a deprecated thing", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["a deprecated thing"]


def test_a_line_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm's own bar is taken away while the line is written, and drawn again below it."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    handler = BesideBars()
    with tqdm(total=3, file=stream, desc="bar", ascii=True) as bar:
        bar.update()
        handler.emit(logging.LogRecord("src", logging.INFO, "", 0, "a line", None, None))
    lines = stream.getvalue().replace("\r", "\n").splitlines()
    assert "a line" in lines and any(line.startswith("bar") for line in lines[lines.index("a line") + 1 :])
