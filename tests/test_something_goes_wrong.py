"""docs/troubleshooting.md quotes what is printed: each quotation, caused."""

import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from src.callbacks.loggers import RunLogger
from src.checkpoints.manifest import check_manifest
from src.checkpoints.save_problem import Problem, failure
from src.commands import run_lock
from src.commands.checks import refuse_other_run
from src.commands.plan import verdict
from src.commands.writable import check_writable
from src.datamodules.resume import check_identity
from src.disk.space import Room
from src.errors import UserError
from src.models.sft_module import SFTModule
from src.strategies import deepspeed_sp, fail_together, operators
from src.strategies.deepspeed_sp import DeepSpeedSPStrategy
from tests.callbacks.test_out_of_memory import Full
from tests.disk.full import full_disk

Given = SimpleNamespace  # tmp_path, monkeypatch, caplog, capsys


def raised(function: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(Exception) as caught:
        function(*args)
    return str(caught.value)


def plan(given: Given) -> str:
    return verdict("configs/32n_sp4.yaml", "--trainer.num_nodes=4")


def place(given: Given) -> str:
    return raised(check_writable, "export.out", "/proc/out")


def memory(given: Given) -> str:
    return raised(Full().training_step, None, 2)


def threads(given: Given) -> str:
    said: list[str] = []
    given.monkeypatch.setattr(deepspeed_sp, "rank_zero_warn", said.append)
    given.monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    given.monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    strategy: Any = DeepSpeedSPStrategy(offload_optimizer=True)
    given.monkeypatch.setattr(DeepSpeedSPStrategy, "num_processes", 8)
    given.monkeypatch.setattr(DeepSpeedSPStrategy, "root_device", torch.device("cuda"))
    strategy._check_threads()
    return said[0]


def one_rank(given: Given) -> str:
    def gather(found: list[Any], own: Any) -> None:
        found[3] = (True, "[Errno 5] Input/output error")

    group = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 8, all_gather_object=gather)
    given.monkeypatch.setattr(fail_together, "dist", group)
    with pytest.raises(UserError) as caught, fail_together.fail_together():
        pass
    return str(caught.value)


def build(given: Given) -> str:
    given.monkeypatch.setattr(cpp_extension, "load", lambda name: name)
    given.monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(given.tmp_path))
    operators.prepare_builds()
    load: Any = cpp_extension.load
    load("cpu_adam")
    return str(given.capsys.readouterr().err).replace(f"in {given.tmp_path}", "in /tmp/...")


def loss(given: Given) -> str:
    strategy = SimpleNamespace(reduce=lambda bad, reduce_op: bad)
    module: Any = SimpleNamespace(trainer=SimpleNamespace(strategy=strategy, global_step=1, world_size=1))
    module._step_sources = []
    losses = SimpleNamespace(loss=torch.tensor(float("nan")), token_losses=torch.tensor([float("nan")]))
    batch: Any = {"sources": ["chats.jsonl:7"], "document_ids": torch.tensor([0])}
    text = raised(SFTModule._refuse_non_finite_loss, module, losses, batch)
    assert "chats.jsonl:7" in text
    return text


def save(given: Given) -> str:
    problem = Problem.of(0, given.tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    text = failure(given.tmp_path / "step=1.ckpt", [problem], 10**12, Room.at(given.tmp_path))
    assert "1,000,000,000,000 bytes" in text and "checkpoint.keep" in text and "training" in text
    return text


def curves(given: Given) -> str:
    with full_disk():
        logger = RunLogger(given.tmp_path, name="tensorboard", version="")
        for step in range(9):
            logger.log_metrics({f"train/{n}": 1.0 for n in range(20)}, step)
    return str(given.caplog.text)


def damage(given: Given) -> str:
    (given.tmp_path / "latest").touch()
    text = raised(check_manifest, given.tmp_path)
    assert "--accept_unlisted true" in text
    return text


def second_fit(given: Given) -> str:
    def taken(*args: Any) -> None:
        raise OSError(errno.EAGAIN, "taken")

    given.monkeypatch.setattr(run_lock.fcntl, "lockf", taken)
    return raised(run_lock.lock_run, given.tmp_path)


def earlier_run(given: Given) -> str:
    (given.tmp_path / "checkpoints/step=3.ckpt").mkdir(parents=True)
    return raised(refuse_other_run, str(given.tmp_path))


def other_rows(given: Given) -> str:
    same = {name: 1 for name in ("max_length", "packing", "seed", "train_weights", "fingerprint", "rows")}
    now = same | {"rows_per_step": 32, "steps_per_epoch": 1}
    text = raised(check_identity, same | {"rows_per_step": 64, "steps_per_epoch": 1}, now, 2, 4)
    assert "--trainer.accumulate_grad_batches 8" in text
    return text


CAUSES: dict[str, Callable[[Given], str]] = {
    "does not fit": plan,
    "cannot be written": place,
    "CUDA out of memory": memory,
    "the optimizer in host memory has one thread per process": threads,
    "rank 3 failed:": one_rank,
    "building cpu_adam in /tmp/...": build,
    "the loss is not finite": loss,
    "was not saved": save,
    "there are no TensorBoard events": curves,
    "bad file": damage,
    "another fit is training there": second_fit,
    "holds checkpoints of an earlier run": earlier_run,
    "but the checkpoint's took": other_rows,
}


def quoted() -> list[str]:
    page = Path("docs/troubleshooting.md").read_text(encoding="utf-8")
    seen = [row.split("|")[1] for row in page.splitlines() if row.startswith("| ")][2:]
    return [text for cell in seen for text in re.findall("`([^`]+)`", cell) if text not in ("val/loss", "plan")]


def test_every_quotation_has_its_cause() -> None:
    assert quoted() == list(CAUSES)


@pytest.mark.parametrize("text", CAUSES)
def test_it_is_what_is_printed(
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.WARNING):
        given = SimpleNamespace(tmp_path=tmp_path, monkeypatch=monkeypatch, caplog=caplog, capsys=capsys)
        assert text in CAUSES[text](given)
