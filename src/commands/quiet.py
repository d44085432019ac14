"""Silences, at its source, library output that no user can act on; errors and other warnings stay."""

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

SOURCE = Path(__file__).parents[1]
# By logger: a logger's filter sees no other logger's records.
LOGGED = {
    "DeepSpeed": r"Setting accelerator to CPU\."  # whether a GPU was asked for is checked by the strategy
    r"|\*+ You are using ZeRO with an untested optimizer",  # tests compare ours with plain AdamW
    "lightning.pytorch.accelerators.cuda": r"LOCAL_RANK: \d+ - CUDA_VISIBLE_DEVICES:",  # by each rank
    "lightning.pytorch.strategies.deepspeed": r"initializing deepspeed distributed",  # by each rank
    "lightning.pytorch.trainer.connectors.checkpoint_connector": r"`weights_only` was not set",
    "lightning.fabric.utilities.seed": r"(\[rank: \d+\] )?Seed set to",  # the config says it
    "lightning.pytorch.utilities.rank_zero": r".*(litlogger|litmodels)"
    r"|TPU available: False|GPU available: False, used: False|GPU available: True \(cuda\), used: True"
    r"|You are using a CUDA device .* that has Tensor Cores"  # no product of a size that matters is in fp32
    r"|Enabling DeepSpeed BF16"  # the config says it
    r"|`Trainer\(val_check_interval=1\.0\)` was configured|Loading `train_dataloader` to estimate"
    r"|`Trainer\.fit` stopped: `max_(steps|epochs)=\d+` reached",  # the last step's line says so
}
WARNED = (
    r"Total length of `list` across ranks is zero|but have no `val_dataloader`",  # a run without validation
    r"The `srun` command is available on your system but is not used",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"When saving the DeepSpeed Stage 3 checkpoint, each worker will save a shard",  # `export` needs no conversion
    r"Argument \w+ \(position \d+\) cannot be converted to a JitArgument",  # within flash-attn-4
    r"Profiler clears events at the end of each cycle",
)


class BesideBars(logging.StreamHandler[TextIO]):
    """Writes records on their own lines above a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr  # the current one, which a bar or a test may have replaced
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _Without(logging.Filter):
    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self._pattern.match(record.getMessage())


def silence() -> None:
    """Call it before the libraries are imported; after works too, except for the bars of `datasets`."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name, pattern in LOGGED.items():
        logging.getLogger(name).addFilter(_Without(pattern))
    for message in WARNED:
        warnings.filterwarnings("ignore", message=rf".*{message}")


def log_our_warnings() -> None:
    """Warnings of our own code become lines of the log, without the place in the code. After Lightning's import."""
    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        path = Path(filename)
        if path.is_relative_to(SOURCE):
            logging.getLogger(".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)).warning(message)
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
