"""Draws benchmarks.node_scaling's layouts: tokens/s a GPU, and the losses of all of them over one another.

python -m benchmarks.plot_scaling docs/scaling.png FOLDER/results.jsonl ...
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ON_DEVICE, ON_HOST = "#0072B2", "#E69F00"  # of the Okabe-Ito palette


def label(line: dict[str, Any]) -> str:
    return f"DP {line['dp']}" + (f"\nSP {line['sp']}" if line["sp"] > 1 else "") + ("\nhost" if line["offload"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture")
    parser.add_argument("results", nargs="+", type=Path)
    options = parser.parse_args()
    rows = [json.loads(text) for path in options.results for text in path.read_text().splitlines()]
    layouts = [row for row in rows if row["kind"] == "layout"]
    figure, (rates, losses) = plt.subplots(1, 2, figsize=(12, 3.4))
    colours = [ON_HOST if line["offload"] else ON_DEVICE for line in layouts]
    bars = rates.bar([label(line) for line in layouts], [line["tokens_per_s_gpu"] for line in layouts], color=colours)
    rates.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    rates.set_title("tokens/s a GPU (orange: the optimizer in host memory)", loc="left", fontsize=10)
    rates.tick_params(labelsize=8)
    longest = max(len(line["losses"]) for line in layouts)
    for line in layouts:
        if len(line["losses"]) == longest:
            style = {"linestyle": "--" if line["sp"] > 1 else "-", "linewidth": 1, "marker": ".", "markersize": 4}
            losses.plot(line["losses"], label=label(line).replace("\n", ", "), **style)
    losses.set_yscale("log")
    losses.set_yticks([7, 10, 20, 35], ["7", "10", "20", "35"])
    losses.minorticks_off()
    losses.set_xticks(range(0, longest, 5))
    losses.set_title(f"loss of {longest} optimizer steps, layouts over one another", loc="left", fontsize=10)
    losses.legend(fontsize=7, frameon=False)
    for axes in (rates, losses):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(options.picture, dpi=120)


if __name__ == "__main__":
    main()
