"""Reads a trace of torch.profiler: which spans of time the device's streams are busy."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Span = tuple[float, float]
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def read(path: Path) -> list[dict[str, Any]]:
    """Events of a .json or .json.gz."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def merged(spans: Sequence[Span]) -> list[Span]:
    """Sorted spans, those that touch made one."""
    out: list[Span] = []
    for start, stop in spans:
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(stop, out[-1][1])
        else:
            out.append((start, stop))
    return out


def overlap(a: Sequence[Span], b: Sequence[Span]) -> float:
    """Time in which both run, of spans each merged and in order."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def spans_of(events: Sequence[dict[str, Any]]) -> list[Span]:
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in events)


def busy(events: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """The parts of the trace's time in which the compute stream, the one with the most kernels, and any stream run
    something; None without device events.
    """
    device = [e for e in events if e.get("cat") in DEVICE and e.get("dur", 0) > 0]
    if not device:
        return None
    streams: dict[Any, list[dict[str, Any]]] = {}
    for event in device:
        streams.setdefault(event["args"].get("stream"), []).append(event)
    compute = max(streams.values(), key=len)
    whole = max(e["ts"] + e["dur"] for e in device) - min(e["ts"] for e in device)
    parts = [sum(stop - start for start, stop in merged(spans_of(chosen))) / whole for chosen in (compute, device)]
    return parts[0], parts[1]
