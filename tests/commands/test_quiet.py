"""The log of a run has what the run says; libraries' chatter is gone, their warnings are not."""

import io
import logging
import re
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm

from src.commands.quiet import LOGGED, SOURCE, BesideBars, log_our_warnings, silence
from tests.command import start_afresh
from tests.commands.test_cli import fit_args

# All that a fit of one step says, a line each.
SAID = (
    r"multi-token prediction: mtp_loss_weight 0\.1, the model has its block",
    r"(train|val): \d+ rows -> \d+ samples, .*",
    r"INFO src\.weights\.load: Random weights: .*",
    r"INFO src\.models\.kernels\.attention: attention kernel: sdpa",
    r"step 1/1  loss .*",
    r"step 1  val/loss .*",
    r"INFO src\.checkpoints\.saving: .*/step=1\.ckpt: .*",
)


def test_a_fit_says_and_imports_nothing_that_nobody_needs(inputs: Path, tmp_path: Path) -> None:
    arguments = [argument for argument in fit_args(inputs, tmp_path) if "progress_bar" not in argument]
    arguments += ["--trainer.max_steps=1", "--trainer.val_check_interval=2", f"--data.cache_dir={tmp_path}/cache"]
    imported = tmp_path / "imported"
    arguments += ["--trainer.callbacks+=tests.commands.imported.Imported", f"--trainer.callbacks.file={imported}"]
    result = start_afresh(*arguments)
    said = result.stderr.splitlines() + result.stdout.splitlines()
    assert [line for line in said if not any(re.fullmatch(pattern, line) for pattern in SAID)] == []
    # What takes seconds, and what the first step needs none of.
    assert {"torch._dynamo.debug_utils", "torch._inductor.compile_fx", "transformers.modeling_utils"}.isdisjoint(
        imported.read_text().split()
    )
    assert [pattern for pattern in SAID if not any(re.fullmatch(pattern, line) for line in said)] == []


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


def test_our_own_warnings_are_lines_of_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    log_our_warnings()
    warnings.showwarning("40 samples cut", UserWarning, str(SOURCE / "datamodules" / "sft.py"), 233)
    warnings.showwarning("theirs", UserWarning, "/elsewhere/sft.py", 1)
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("src.datamodules.sft", "40 samples cut")
    ]
    assert [str(warning.message) for warning in recwarn] == ["theirs"]


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
