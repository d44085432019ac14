"""What `rehearse` is asked is refused before anything is built, and what it answers is what it has measured."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.commands.config_command import parse
from src.commands.plan import plan_file
from src.commands.rehearse import RehearseCLI, check_own, hold_to, report
from src.errors import UserError
from src.rehearsal.job import Measured, _Record
from src.units import GIB

TINY = "configs/tiny_cpu.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeline=t.json"], "--timeline t.json needs a GPU, and this rank runs on CPU"),
        (["--gpu_memory=8"], "--gpu_memory 8.0 needs a GPU, and this rank runs on CPU"),
        (["--steps=1"], "steps is 1; it must be in [2, 1e6]"),
        (["--steps=1000000000"], "steps is 1000000000; it must be in [2, 1e6]"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        RehearseCLI(["--config", TINY, *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("file", ["t.json", "t.json.gz"])
def test_a_timeline_needs_a_middle_micro_step_and_a_place(file: str, tmp_path: Path) -> None:
    def check(timeline: Path | str, micro_steps: int) -> None:
        arguments = [f"--timeline={timeline}", f"--trainer.accumulate_grad_batches={micro_steps}"]
        check_own(parse("rehearse", ["--config", TINY, *arguments])[1], cuda=True)

    check(tmp_path / file, 3)
    for micro_steps in (1, 2):
        with pytest.raises(UserError, match=f"accumulate_grad_batches is {micro_steps}; give 3 or more, or leave"):
            check(tmp_path / file, micro_steps)
    for place in (f"/proc/{file}", tmp_path / "nowhere" / file):
        with pytest.raises(UserError, match=f"--timeline {place} cannot be written: "):
            check(place, 3)
    with pytest.raises(UserError, match=r"has another suffix; use one of \.json, \.json\.gz"):
        check(tmp_path / f"{file}.txt", 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gib", "fraction"), [(0.5, None), (2, None), (2.5, 0.00625), (42, 0.5), (82, 1), (82.1, None)]
)
def test_a_smaller_card_has_room_beside_what_is_not_pytorchs(
    gib: float, fraction: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [("CUDA context", 0.5), ("NCCL", 1.5), ("allocator", 9)]
    plan: Any = SimpleNamespace(overhead=[SimpleNamespace(name=name, nbytes=int(n * GIB)) for name, n in lines])
    set_to: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_to.append)
    if fraction is None:
        with pytest.raises(
            UserError, match=rf"--gpu_memory is {gib}; it must be in \(2\.0, 82\.0\]: .* card has 80\.0"
        ):
            hold_to(gib, plan)
    else:
        hold_to(gib, plan)
    assert set_to == ([] if fraction is None else [fraction])


@pytest.mark.parametrize(
    ("step", "label", "other"),
    [([2.0], "the micro-step and", "the last and"), ([1.0, 2.0], "the last and", "the micro-step and")],
)
def test_a_row_is_named_for_what_it_times(step: list[float], label: str, other: str) -> None:
    plan = plan_file(TINY, f"--trainer.accumulate_grad_batches={len(step)}")
    said = report(plan, Measured(micro_steps=[step], losses=[5.0], gather=1e9), [[16]])
    assert f"{label} the optimizer, s" in said and other not in said
    assert ("a micro-step, s" in said) == (len(step) > 1)


@pytest.mark.parametrize("written", [None, "", '{"traceEvents": [{'])
def test_a_timeline_that_is_lost_costs_no_measurement(
    written: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is there, or what a full disk took."""
    path, measured = tmp_path / "t.json", Measured()
    record = _Record(measured, path)
    record._steps, record._began = [[1.0]], 0.0
    record._profile = SimpleNamespace(  # type: ignore[assignment]
        stop=lambda: None, export_chrome_trace=lambda file: written is None or path.write_text(written)
    )
    record.on_train_batch_end(None)  # type: ignore[arg-type]
    assert measured.busy is None and record._profile is None
    assert f"--timeline {path} was not written: " in caplog.text
