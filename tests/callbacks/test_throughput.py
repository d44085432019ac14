"""What a step was like: one point a step, its parts add up, and MFU counts documents as long as they are."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from src.callbacks import throughput as module
from src.callbacks.phase_timer import TRAINING
from src.callbacks.throughput import GIB, Throughput
from src.models.deepseek_v3 import DeepseekV3ForCausalLM, config_from_dict
from src.models.deepseek_v3.flops import packed_flops, step_flops
from tests.models.tiny import DEEPSEEK_V3

from .stub import LENGTHS, STEPS, Stub, train


def rows_of(folder: Path) -> list[dict[str, float]]:
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


@pytest.mark.parametrize("peak", [None, 1e12])
def test_a_step_adds_up(peak: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "peak_flops", lambda device: peak)
    stub, logger = Stub(), CSVLogger(tmp_path)
    train(stub, Throughput(), logger=logger)
    rows = [row for row in rows_of(Path(logger.log_dir)) if "train/tokens_per_second" in row]
    tokens = [sum(map(sum, LENGTHS[:2])), sum(map(sum, LENGTHS[2:]))] * (STEPS // 2)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, count in zip(rows, tokens, strict=True):
        assert row["train/tokens_per_second"] * row["train/step_seconds"] == pytest.approx(count)
        assert sum(row[f"time/{phase}"] for phase in TRAINING) == pytest.approx(row["train/step_seconds"])
        assert row["time/forward"] > 0 and row["time/backward"] > 0 and row["time/data"] > 0
        assert ("train/mfu" in row) == (peak is not None)
        if peak is not None:
            assert row["train/mfu"] == pytest.approx(1e9 / (row["train/step_seconds"] * peak))
    if peak is not None:  # tokens, their squared lengths without the padding's, both kinds of targets
        assert stub.counted[:2] == [(15, 9 + 25 + 49, 11, 9), (10, 16 + 16 + 4, 11, 9)]
    memory = {name for row in rows for name in row if name.startswith("memory/")}
    assert memory == {"memory/host_available_gib"} and all(row["memory/host_available_gib"] > 0 for row in rows)


def test_little_host_memory_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([500, 15, 14, 13, *[12] * STEPS])
    monkeypatch.setattr(
        module.psutil, "virtual_memory", lambda: SimpleNamespace(available=next(left) * GIB, total=1000 * GIB)
    )
    with pytest.warns(UserWarning, match="the node of rank 0 has 15 GiB of host memory left, 1.5%") as warned:
        train(Stub(), Throughput(), logger=CSVLogger(tmp_path))
    assert sum("of host memory left" in str(warning.message) for warning in warned) == 1


@pytest.mark.parametrize("mtp", [False, True])
def test_the_model_counts_what_planning_counts(mtp: bool) -> None:
    config = config_from_dict(DEEPSEEK_V3)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config, with_mtp=mtp)
    lengths = [3, 50, 21]
    expected = step_flops(config, lengths, 40 + mtp * 30, mtp)
    assert model.step_flops(74, 9 + 2500 + 441, 40, 30) == expected
    assert packed_flops(config, 74, 9 + 2500 + 442, 40 + mtp * 30, mtp) > expected


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("Radeon", None)],
)
def test_peaks_by_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert module.peak_flops(torch.device("cuda")) == peak
    assert module.peak_flops(torch.device("cpu")) is None
