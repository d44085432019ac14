"""The benchmark of one node's GPUs runs whole on CPU: it is meant for a machine that is lent for minutes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.node_scaling import Bench, expert_layouts, layouts, main, packed
from benchmarks.timeline import analyse, lines
from src.rehearsal.timeline import merged, overlap, read
from tests.command import run


def test_layouts() -> None:
    assert [layout.name for layout in layouts(2)] == [
        "dp1_sp1",
        "dp2_sp1",
        "dp1_sp2",
        "dp2_sp1_offload",
        "dp1_sp2_offload",
    ]
    assert len(layouts(8)) == 1 + 2 + 3 + 4 + 4
    names = ["dp2_sp1", "dp2_sp1_ep2", "dp2_sp1_bf16", "dp2_sp1_ep2_bf16"]
    assert [layout.name for layout in expert_layouts(2)] == names


def test_overlap() -> None:
    assert merged([(0, 2), (1, 3), (5, 6)]) == [(0, 3), (5, 6)]
    assert overlap([(0, 3), (5, 6)], [(2, 5.5)]) == 1.5


def test_a_trace_is_read(tmp_path: Path) -> None:
    def kernel(name: str, ts: float, dur: float, launch: int, **args: Any) -> dict[str, Any]:
        return {
            "cat": "kernel",
            "name": name,
            "ts": ts,
            "dur": dur,
            "args": {"External id": launch, "stream": 7} | args,
        }

    def launched(launch: int, **args: Any) -> dict[str, Any]:
        return {"cat": "cpu_op", "name": "gemm", "ts": 0, "dur": 9000, "args": {"External id": launch} | args}

    gather = {"Collective name": "_allgather_base", "In msg nelems": 250_000, "Out msg nelems": 500_000}
    events = [
        kernel("gemm", 0, 1000, 1),
        kernel("gemm", 2000, 1500, 2),
        kernel("gemm", 4000, 500, 3),  # of another shape
        kernel(
            "ncclDevKernel_AllGather_RING", 1900, 2000, 4, stream=20, dtype="BFloat16", **{"Group size": 2}, **gather
        ),
        *(launched(launch, **{"Input Dims": [[8, 8], [8, 8]]}) for launch in (1, 2)),
        launched(3, **{"Input Dims": [[4, 4], [4, 4]]}),
    ]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = analyse(read(packed(path)))
    assert (found["device_ms"], found["compute_ms"]) == (4.5, 3.0)
    assert (found["nccl_ms"], found["nccl_alone_ms"]) == (2.0, 0.5)
    assert found["collectives"] == [
        {"name": "_allgather_base over 2", "stream": "20", "kernels": 1, "gb": 1e-3, "ms": 2.0, "alone_ms": 0.5}
    ]
    assert (found["products_beside"], found["products"]) == (1.5, 1)
    assert not path.exists() and any("1.50 x their time alone, 1 of them" in text for text in lines(found))


def test_four_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By its own launcher where there are two, forked where there are more, which is cheaper."""
    torchrun, start = Bench.torchrun, subprocess.run

    def launched(bench: Bench, processes: int, *command: str) -> float:
        if processes == 2:
            return torchrun(bench, processes, *command)
        run(*command[2:], module=command[1], ranks=processes)
        return 0.0

    def started(command: list[str], **options: Any) -> Any:
        return run(*command[3:]) if command[1:4] == ["-m", "src.cli", "plan"] else start(command, **options)

    monkeypatch.setattr(Bench, "torchrun", launched)
    monkeypatch.setattr(subprocess, "run", started)
    out = tmp_path / "scaling"
    options = {
        "--out": out,
        "--device": "cpu",
        "--gpus": 4,
        "--model": "configs/models/tiny",
        "--experts": 0,
        "--tokens": 64,
        "--vocab": 512,
        "--steps": 2,
        "--only": "dp4_sp1_ep2_bf16",
        "--weights": tmp_path / "weights",
    }
    arguments = [str(x) for pair in options.items() for x in pair]
    monkeypatch.setattr("sys.argv", ["node_scaling", *arguments, "--parts", "experts", "exchanges"])
    main()
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    layout, *exchanges = lines
    assert (layout["dp"], layout["ep"], layout["gpus"], len(layout["losses"])) == (4, 2, 4, 2)
    assert layout["losses"][1] < layout["losses"][0] < 7 and layout["plan"]
    assert [line["sp"] for line in exchanges] == [2, 4]
    assert all(line["latents_mib"] < line["expanded_mib"] for line in exchanges)
    assert "| dp4_sp1_ep2_bf16 |" in capsys.readouterr().out
