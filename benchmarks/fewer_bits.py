"""What fewer bits do to a training: experts' gradients sent in bf16, experts' products in FP8; losses beside fp32's.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m benchmarks.fewer_bits --data gsm8k/train.jsonl --val gsm8k/val.jsonl
        [--steps 200] [--out F.json]

Four CPU processes train a small model (that of `benchmarks.rounding`) from the same random weights: bf16 parameters,
rounded stochastically from fp32 masters, as in a real job; with fp32 parameters autograd makes fp32 gradients and
nothing is sent in bf16. Two nodes of two processes round each node's sum once. Four nodes of one process round nothing,
but sum in another order than fp32's reduction: how far that takes the loss is what the format cannot be blamed for.
Reduced gradients are compared with sums in fp64 as they occur; validation losses are those of the masters. FP8 products
are those of `benchmarks.fp8_experts`, emulated: forward and input's gradient, of operands that were cast and cast back.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import head, table
from benchmarks.fp8_experts import cast
from benchmarks.rounding import Bench, exported

RANKS = 4
RUNS: dict[str, dict[str, object]] = {  # options of the strategy; seed: of the order of rows; fp8: products
    "fp32": {},
    "bf16, one rounding per node": {"reduce_dtype": "bf16", "reduce_node_size": 2},
    "bf16, one exchange": {"reduce_dtype": "bf16", "reduce_node_size": 1},
    "fp32, rows in another order": {"seed": 1},
    "fp32, experts' products in FP8": {"fp8": "1"},
}


def in_fp8() -> None:
    """Has experts multiply as with FP8 operands, but for the weights' gradients."""
    from src.models.deepseek_v3 import experts

    ours = experts.grouped_mm

    def there_and_back(x: Tensor) -> Tensor:
        codes, scale = cast(x)
        return (codes.float() * scale[..., None]).to(x.dtype)

    def product(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        if weights.ndim == 3:
            x, weights = there_and_back(x), there_and_back(weights.mT).mT
        return ours(x, weights, offsets)

    experts.grouped_mm = product  # type: ignore[assignment]


def fit_and_compare(args: list[str]) -> None:
    """One rank's `fit`; rank 0 writes to $REDUCED how far reduced gradients are off, reduction by reduction:
    [squared norm of the error, of the exact sum]."""
    import torch.distributed as dist

    from src.cli import main as command
    from src.strategies import zero3_collectives
    from src.strategies.bf16_reduction import BF16Reduction

    ours, found = BF16Reduction.reduce_scatter, list[list[float]]()

    def compared(self: BF16Reduction, gradients: Sequence[Tensor], rank: int, divisor: int) -> list[Tensor]:
        parts = ours(self, gradients, rank, divisor)
        doubles = [gradient.double() for gradient in gradients]
        exact = zero3_collectives.reduce_scatter(doubles, dist.group.WORLD, torch.float64, divisor)
        errors = (part - whole for part, whole in zip(parts, exact, strict=True))
        norms = torch.stack([sum(t.square().sum() for t in tensors) for tensors in (errors, exact)])
        dist.all_reduce(norms)
        found.append(norms.tolist())
        return parts

    BF16Reduction.reduce_scatter = compared  # type: ignore[method-assign]
    if os.environ["FP8"]:
        in_fp8()
    command(args)
    if os.environ["RANK"] == "0":
        Path(os.environ["REDUCED"]).write_text(json.dumps(found))


def train(bench: Bench, name: str, settings: dict[str, object]) -> dict[str, Any]:
    """Losses of a run and, by step, the relative error of its reductions."""
    options, folder = bench.options, bench.folder / name.replace(" ", "_")
    rest = {key: value for key, value in settings.items() if key not in ("seed", "fp8")}
    reduced = bench.folder / "reduced.json"
    checkpoint = bench.fit(
        folder.name,
        "before",
        options.steps,
        1,
        3e-3,
        {"ranks": RANKS, "module": "benchmarks.fewer_bits", "REDUCED": str(reduced), "FP8": settings.get("fp8", "")},
        **{
            "trainer.devices": RANKS,
            "trainer.precision": "bf16-true",
            "trainer.log_every_n_steps": 1,
            "model.pretrained": bench.model,
            "model.from_scratch": "true",
            "model.min_learning_rate": 3e-4,
            "model.weight_rounding": "stochastic",
            "data.seed": settings.get("seed", 0),
            **{f"trainer.strategy.init_args.{key}": value for key, value in rest.items()},
        },
    )
    (file,) = folder.glob("csv/**/metrics.csv")
    with open(file) as lines:
        losses = [float(row["train/loss"]) for row in csv.DictReader(lines) if row.get("train/loss")]
    assert len(losses) == options.steps, f"{len(losses)} losses of {options.steps} steps"
    pairs = torch.tensor(json.loads(reduced.read_text())).view(options.steps, -1, 2).sum(1) if rest else None
    exported(checkpoint, folder / "fp32", "fp32")
    return {
        "losses": losses,
        "errors": None if pairs is None else (pairs[:, 0] / pairs[:, 1]).sqrt().tolist(),
        "validation": bench.loss(folder / "fp32"),
    }


def report(found: dict[str, dict[str, Any]]) -> None:
    before, rows, last = found["fp32"], list[list[object]](), len(found["fp32"]["losses"]) // 4
    for name, run in found.items():
        apart = [abs(loss - other) for loss, other in zip(run["losses"], before["losses"], strict=True)]
        same_rows = "seed" not in RUNS[name] and run is not before
        rows.append(
            [
                name,
                f"{median(run['errors']):.2g} ({max(run['errors']):.2g})" if run["errors"] else "",
                f"{mean(apart):.4f} ({max(apart):.4f})" if same_rows else "",
                f"{mean(run['losses'][-last:]):.4f}",
                f"{run['validation']:.4f}",
            ]
        )
    print("Step by step: mean or median (and most).\n")
    columns = ["", "error of reductions", "loss apart from fp32's", f"mean loss of the last {last} steps"]
    table([*columns, "validation loss"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--val_rows", type=int, default=60)
    parser.add_argument("--out", type=Path, help="a JSON file of finished runs, which are not run again")
    options = parser.parse_args()
    head(f"Fewer bits over {options.steps} steps, {RANKS} processes", torch.device("cpu"))
    known = options.out is not None and options.out.exists()
    found: dict[str, dict[str, Any]] = json.loads(options.out.read_text()) if known else {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name in [name for name in RUNS if name not in found]:
            found[name] = train(bench, name, RUNS[name])
            if options.out:
                options.out.write_text(json.dumps(found))
    found = {name: found[name] for name in RUNS}
    report(found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["fit"]:
        fit_and_compare(sys.argv[1:])
    else:
        main()
