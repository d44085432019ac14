"""Draws a trace of benchmarks.step or benchmarks.layer: what each stream of the device does when.

    python -m benchmarks.plot_trace step.json.gz docs/step.png [--title TEXT]

The trace itself opens in https://ui.perfetto.dev. Also prints each kind's share of the time.
"""

import argparse
import gzip
import json
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

# The first kind whose word is in an event's name; colours are of the Okabe-Ito palette.
KINDS = [
    ("attention", ("flash",), "#0072B2"),
    ("expert products", ("GemmUniversal", "cutlass13device_kernel", "grouped"), "#D55E00"),
    ("other products", ("nvjet", "gemm", "cublas"), "#E69F00"),
    ("copy to the device", ("Memcpy HtoD",), "#009E73"),
    ("copy to the host", ("Memcpy DtoH",), "#CC79A7"),
    ("NCCL", ("nccl",), "#56B4E9"),
    ("everything else", ("",), "#999999"),
]


def kind_of(name: str) -> int:
    return next(i for i, (_, words, _) in enumerate(KINDS) if any(word.lower() in name.lower() for word in words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("picture")
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    with gzip.open(options.trace) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and e["dur"] > 0]
    began = min(e["ts"] for e in device)
    span = max(e["ts"] + e["dur"] for e in device) - began
    streams: dict[int, list[dict[str, Any]]] = {}
    for event in device:
        streams.setdefault(event["args"]["stream"], []).append(event)
    busiest = sorted(streams, key=lambda s: -sum(e["dur"] for e in streams[s]))[:5]

    figure, axes = plt.subplots(figsize=(12, 0.6 + 0.55 * len(busiest)))
    for lane, stream in enumerate(busiest):
        for kind, (_, _, colour) in enumerate(KINDS):
            bars = [
                ((e["ts"] - began) / 1e3, max(e["dur"] / 1e3, span / 4e6))
                for e in streams[stream]
                if kind_of(e["name"]) == kind
            ]
            axes.broken_barh(bars, (lane - 0.4, 0.8), facecolors=colour, linewidth=0)
    axes.set_yticks(range(len(busiest)), [f"stream {s}" for s in busiest])
    axes.invert_yaxis()
    axes.set_xlim(0, span / 1e3)
    axes.set_xlabel("ms")
    axes.set_title(options.title, loc="left", fontsize=10)
    axes.legend(
        handles=[Patch(color=colour, label=name) for name, _, colour in KINDS],
        ncols=len(KINDS), fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.28),
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.picture, dpi=150, bbox_inches="tight")

    print(f"{span / 1e3:.0f} ms from the first to the last")
    for kind, (name, _, _) in enumerate(KINDS):
        total = sum(e["dur"] for e in device if kind_of(e["name"]) == kind)
        print(f"{name:20} {total / 1e3:9.1f} ms  {total / span:6.1%}")
    for stream in busiest:
        busy, end = 0.0, 0.0
        for event in sorted(streams[stream], key=lambda e: e["ts"]):
            start = max(event["ts"], end)
            busy += max(0.0, event["ts"] + event["dur"] - start)
            end = max(end, event["ts"] + event["dur"])
        print(f"stream {stream:<13} {busy / 1e3:9.1f} ms  {busy / span:6.1%} busy")


if __name__ == "__main__":
    main()
