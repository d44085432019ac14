"""Draws a run's loss curve from its TensorBoard files: `python scripts/plot_loss.py runs/demo-<time> [--out FILE]`."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = list[tuple[int, float]]


def read_curves(run: Path, tags: list[str]) -> dict[str, Curve]:
    """Reads (step, value) of each tag, merged over all event files below `run` (a resumed run has several).

    Where two files have the same step, the later file's value stands.
    """
    files = sorted(run.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise SystemExit(f"{run}: no TensorBoard event file below this folder; give the run's default_root_dir.")
    points: dict[str, dict[int, float]] = {tag: {} for tag in tags}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in set(tags) & set(events.Tags()["scalars"]):
            points[tag].update({event.step: event.value for event in events.Scalars(tag)})
    return {tag: sorted(values.items()) for tag, values in points.items() if values}


def draw(curves: dict[str, Curve], out: Path) -> None:
    """Writes the picture: one line a tag, with markers where a tag has few points."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for tag, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, marker="o" if len(curve) < 20 else None, markersize=4, linewidth=1.5, label=tag)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per target token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run's default_root_dir")
    parser.add_argument("--out", type=Path, help="the PNG to write (default: loss.png in the run's folder)")
    parser.add_argument("--tags", nargs="+", default=["train/loss", "val/loss"], help="what to draw")
    args = parser.parse_args()
    curves = read_curves(args.run, args.tags)
    if not curves:
        raise SystemExit(f"{args.run}: its event files have none of {', '.join(args.tags)}.")
    out = args.out or args.run / "loss.png"
    draw(curves, out)
    for tag, curve in curves.items():
        (first, start), (last, end) = curve[0], curve[-1]
        print(f"{tag}: {start:.3f} at step {first}, {end:.3f} at step {last}")
    print(f"picture: {out}")


if __name__ == "__main__":
    main()
