"""A rank that sleeps is named, every rank's stacks are there, and the processes end."""

import json
import time
from pathlib import Path

import pytest
from torch import Tensor
from torch.multiprocessing import ProcessExitedException

from src.callbacks.watchdog import EXIT_STATUS, Watchdog
from src.models.sft_module import Batch, SFTModule

from .spawn import run_distributed
from .training import Layout, Recipe, fit

LAYOUT = Layout(dp=1, sp=2, accumulation=2, batch_size=2)


class Sleeper(SFTModule):
    """Rank 1 falls asleep in the second step's second forward."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == 3 and self.global_rank == 1:
            time.sleep(600)
        return super().training_step(batch, batch_idx)


def hang(directory: str, root: str) -> None:
    watchdog = Watchdog(minutes=0.1)
    fit(LAYOUT, Recipe(mtp_loss_weight=0), directory, 40, root, Sleeper, more_callbacks=(watchdog,))


def test_the_rank_that_sleeps_is_named(directory: str, tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks/report.txt").write_text("of an earlier hang")
    with pytest.raises(ProcessExitedException) as ended:
        run_distributed(hang, 2, directory, str(tmp_path))
    assert ended.value.exit_code == EXIT_STATUS
    report = (tmp_path / "stacks/report.txt").read_text()
    assert "2 of 2 ranks reported" in report
    (slow,) = [line for line in report.splitlines() if line.startswith("The slow rank is behind the others")]
    assert "rank 1 on " in slow and "in phase forward of step 2, micro-step 2 of 2" in slow
    assert f"at {__file__}:" in slow and "in training_step" in slow
    (others,) = [line for line in report.splitlines() if line.startswith("The others: rank 0")]
    assert "torch/distributed/" in others
    for rank in range(2):
        state, _, *stacks = (tmp_path / f"stacks/rank-{rank}.txt").read_text().splitlines()
        assert json.loads(state)["rank"] == rank and sum("in training_step" in line for line in stacks) > 0
    (earlier,) = tmp_path.glob("stacks-until-*")
    assert (earlier / "report.txt").read_text() == "of an earlier hang"
