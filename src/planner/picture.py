"""The simulated micro-step for Perfetto, and drawn."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.planner.streams import CAST, COMPUTE, EP, FROM_HOST, HOST, SP, STREAMS, TO_HOST, ZERO, Span, makespan

COLOURS = {
    COMPUTE: "#0072B2",
    ZERO: "#D55E00",
    SP: "#E69F00",
    EP: "#F0E442",
    TO_HOST: "#CC79A7",
    FROM_HOST: "#009E73",
    CAST: "#56B4E9",
}


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """Events as https://ui.perfetto.dev reads them: microseconds, one thread per stream."""
    threads = [stream for stream in STREAMS if stream != HOST]
    names = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": n}} for i, n in enumerate(threads)]
    events = [
        {"name": op.name, "ph": "X", "pid": 0, "tid": threads.index(op.stream), "ts": 1e6 * start}
        | {"dur": 1e6 * (end - start)}
        for op, start, end in spans
        if op.stream != HOST and op.seconds
    ]
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}


def write_trace(path: str | Path, spans: Sequence[Span]) -> None:
    Path(path).write_text(json.dumps(chrome_trace(spans)), encoding="utf-8")


def draw(path: str | Path, spans: Sequence[Span], title: str) -> None:
    """A bar per stream over the whole micro-step; below, larger, 3 % of it from the backward pass. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole = makespan(spans)
    lanes = [stream for stream in COLOURS if any(span.op.stream == stream and span.op.seconds for span in spans)]
    figure, plots = plt.subplots(2, 1, figsize=(12, 1.6 + 0.8 * len(lanes)))
    for axes, (begin, end) in zip(plots, ((0.0, whole), (0.6 * whole, 0.63 * whole)), strict=True):
        for lane, stream in enumerate(lanes):
            bars = [
                (s.start, s.end - s.start) for s in spans if s.op.stream == stream and s.end > begin and s.start < end
            ]
            axes.broken_barh(bars, (lane - 0.4, 0.8), facecolors=COLOURS[stream], linewidth=0)
        axes.set_yticks(range(len(lanes)), lanes, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(begin, end)
        axes.spines[["top", "right"]].set_visible(False)
    plots[0].set_title(textwrap.fill(title, 130), loc="left", fontsize=10)
    plots[1].set_xlabel("s")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
