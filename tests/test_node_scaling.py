"""The benchmark of one node's GPUs runs whole on CPU: it is meant for a machine that is lent for minutes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.node_scaling import layouts, packed
from benchmarks.timeline import analyse, lines
from src.rehearsal.timeline import merged, overlap, read
from tests.distributed.spawn import run_distributed  # noqa: F401  # spawns too: one at a time (conftest.py)

ROOT = Path(__file__).parents[1]


def test_layouts() -> None:
    assert [layout.name for layout in layouts(2)] == [
        "dp1_sp1",
        "dp2_sp1",
        "dp1_sp2",
        "dp2_sp1_offload",
        "dp1_sp2_offload",
    ]
    assert len(layouts(8)) == 1 + 2 + 3 + 4 + 4


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


def test_four_processes(tmp_path: Path) -> None:
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
        "--only": "dp2_sp2",
    }
    command = [sys.executable, "-m", "benchmarks.node_scaling", *(str(x) for pair in options.items() for x in pair)]
    result = subprocess.run(
        [*command, "--parts", "scaling", "exchanges"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    log = out / "log.txt"
    assert result.returncode == 0, result.stderr[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    layout, *exchanges = lines
    assert (layout["dp"], layout["sp"], layout["gpus"], len(layout["losses"])) == (2, 2, 4, 2)
    assert layout["losses"][1] < layout["losses"][0] < 7 and layout["plan"]
    assert [line["sp"] for line in exchanges] == [2, 4]
    assert all(line["latents_mib"] < line["expanded_mib"] for line in exchanges)
    assert "| dp2_sp2 |" in result.stdout
