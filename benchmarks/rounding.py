"""What rounding leaves of a fine-tuning, by loss: masters, BF16 and FP8 exports, for each learning rate.

    DS_ACCELERATOR=cpu python -m benchmarks.rounding --data gsm8k/train.jsonl --val gsm8k/val.jsonl [--steps 200]
        [--rates 2e-7 1e-6 1e-5] [--out results.json]

On CPU, with configs/models/tiny and the first 4,000 tokens of DeepSeek's vocabulary. A model is trained from random
weights on the first two thirds of the data and exported in FP8: the base. It is then trained on the last third, at each
learning rate, from the FP8 file (masters true to it) and from its BF16 rounding (where masters start on BF16's grid),
with both ways of rounding weights. Every run is exported in fp32, BF16 and FP8, and the validation loss of each
directory is computed in fp32, with the values that it holds.

Without --data: what is kept of made-up updates of weights of standard deviation 0.02.
"""

import argparse
import csv
import json
import re
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.common import head, table
from src.commands.export import export
from src.datamodules import SFTDataModule
from src.models.deepseek_v3 import DeepseekV3ForCausalLM, LossWeights, load_config
from src.strategies.partition import materialise
from src.strategies.rounding import Rounding
from src.weights.fp8 import dequantise, quantise, quantise_change
from src.weights.hf_reader import HFDirectorySource
from src.weights.kept import Kept
from src.weights.load import load
from tests.command import run
from tests.small import save_tokenizer

RATES = (2e-7, 1e-6, 1e-5)
ROW, TOKENS = 256, 4000


@dataclass(frozen=True)
class Run:
    """A fine-tuning: from which base, at which rate, with which rounding of weights."""

    base: str
    rate: float
    rounding: str

    @property
    def name(self) -> str:
        return f"{self.base}_{self.rate:g}_{self.rounding}"


class Bench:
    """Where everything lies, and how a run is started."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        lines = Path(options.data).read_text(encoding="utf-8").splitlines(keepends=True)
        cut = 2 * len(lines) // 3
        self.files = {name: folder / f"{name}.jsonl" for name in ("before", "tune")}
        self.files["before"].write_text("".join(lines[:cut]), encoding="utf-8")
        self.files["tune"].write_text("".join(lines[cut:]), encoding="utf-8")
        self.model = folder / "model"
        self.model.mkdir()
        fields = json.loads(Path("configs/models/tiny/config.json").read_text()) | {"vocab_size": TOKENS + 96}
        fields |= {"num_hidden_layers": 2, "n_routed_experts": 8}
        (self.model / "config.json").write_text(json.dumps(fields))
        save_tokenizer(self.model, TOKENS)
        self.rows = self._validation_rows()

    def data(self, train: str) -> SFTDataModule:
        return SFTDataModule(
            [str(self.files[train])],
            val_files=[self.options.val],
            tokenizer=str(self.model),
            max_length=ROW,
            cache_dir=str(self.folder / "cache"),
            num_workers=0,
        )

    def _validation_rows(self) -> list[dict[str, Any]]:
        """Also builds both caches, so that the runs need not."""
        for train in self.files:
            data = self.data(train)
            data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
            data.prepare_data()
        data.setup("fit")
        (loader,) = data.val_dataloader()
        return list(loader)[: self.options.val_rows]

    def fit(
        self,
        name: str,
        train: str,
        steps: int,
        batch: int,
        rate: float,
        launch: dict[str, Any] | None = None,
        **settings: object,
    ) -> Path:
        """Trains in processes of its own, by `launch` of `tests.command.run` one; returns its last checkpoint."""
        root = self.folder / name
        defaults: dict[str, object] = {
            "trainer.devices": 1,
            "trainer.strategy.init_args.sequence_parallel_size": 1,
            "trainer.default_root_dir": root,
            "trainer.max_steps": steps,
            "trainer.max_epochs": -1,
            "trainer.limit_val_batches": 0,
            "trainer.enable_progress_bar": "false",
            "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
            "trainer.logger.save_dir": root / "csv",
            "checkpoint.every_n_train_steps": 0,
            "model.learning_rate": rate,
            "model.activation_checkpointing": "false",
            "data.train_files": json.dumps([str(self.files[train])]),
            "data.val_files": json.dumps([self.options.val]),
            "data.tokenizer": self.model,
            "data.max_length": ROW,
            "data.batch_size": batch,
            "data.num_workers": 0,
            "data.cache_dir": self.folder / "cache",
        }
        args = [f"--{key}={value}" for key, value in (defaults | settings).items()]
        run("fit", "--config=configs/tiny_cpu.yaml", *args, **(launch or {}))
        return root / "checkpoints" / "last.ckpt"

    @torch.no_grad()
    def loss(self, directory: Path) -> float:
        """Mean cross-entropy of the validation rows' targets, in fp32, with the values of a Hugging Face directory."""
        device = torch.device("cpu")
        config = load_config(str(directory))
        with torch.device("meta"):
            model = DeepseekV3ForCausalLM(config)
        materialise(model, {}, 0, device)
        load(model, HFDirectorySource(directory), num_hidden_layers=config.num_hidden_layers, progress=False)
        model.set_attention_kernel("sdpa")
        total = targets = 0.0
        names = ("input_ids", "labels", "cu_seqlens", "max_seqlen", "document_ids", "mtp_input_ids", "mtp_labels")
        for row in self.rows:
            total += float(model(**{name: row[name] for name in names}, weights=LossWeights()).cross_entropy)
            targets += int((row["labels"] >= 0).sum())
        return total / targets


def exported(checkpoint: Path, out: Path, dtype: Any, base: Path | None = None) -> dict[str, float]:
    """Exports; returns what it says of all weights, kept and error."""
    text = StringIO()
    with redirect_stdout(text):
        export(str(checkpoint), str(out), dtype, base=None if base is None else str(base))
    found = re.search(r"^\| whole \| (\S+)% \| (\S+)% \|$", text.getvalue(), re.MULTILINE)
    return {} if found is None else {"kept": float(found[1]) / 100, "error": float(found[2]) / 100}


def forward_kept(root: Path) -> float:
    """The last `rounding/kept` that a run logged."""
    (file,) = root.glob("csv/**/metrics.csv")
    with open(file) as lines:
        found = [row["rounding/kept"] for row in csv.DictReader(lines) if row.get("rounding/kept")]
    return float(found[-1])


def measure(bench: Bench, one: Run, bases: dict[str, Path]) -> dict[str, Any]:
    """Trains and exports; the losses are the caller's."""
    settings = {
        "model.pretrained": bases[one.base],
        "model.from_scratch": "false",
        "model.min_learning_rate": one.rate,
        "model.warmup_ratio": 0,
        "model.weight_rounding": one.rounding,
        "trainer.precision": "bf16-true",
        "rounding.every_n_steps": bench.options.steps,
    }
    checkpoint = bench.fit(one.name, "tune", bench.options.steps, bench.options.batch, one.rate, **settings)
    return {"checkpoint": str(checkpoint), "forward": forward_kept(bench.folder / one.name)}


def updates(size: int = 2048) -> None:
    """What is kept of an update that goes on in one direction, and of a random walk, by our own export and rounding."""
    torch.manual_seed(0)
    codes, scale = quantise(torch.randn(size, size) * 0.02)
    fp8 = dequantise(codes.view(-1), scale, 0, size).view(size, size)
    bf16 = fp8.bfloat16().float()
    rows = []
    for rate, steps in ((2e-7, 200), (2e-7, 1000), (1e-6, 200), (1e-6, 1000), (1e-5, 200)):
        found: dict[str, list[str]] = {}
        for walk in (False, True):
            step = torch.randn(size, size)
            change = step * rate * steps**0.5 if walk else step.sign() * rate * steps
            for name, base, scales, dtype in (
                ("BF16 file, BF16 base", bf16, None, "bf16"),
                ("BF16 file, FP8 base", fp8, None, "bf16"),
                ("forward, stochastic", bf16, None, "stochastic"),
                ("FP8 file, FP8 base", fp8, scale, "fp8"),
            ):
                masters, kept = base + change, Kept()
                if dtype == "fp8":
                    left = quantise_change(masters, base, scales)[2]
                else:
                    weights = masters.bfloat16()
                    if dtype == "stochastic":
                        Rounding("stochastic")(masters.view(-1), weights.view(-1), "weight", 0, steps)
                    left = weights.float() - base.bfloat16().float()
                kept.add(left, masters - base)
                found.setdefault(name, []).append(f"{kept.part:.0%} ({kept.relative_error:.0%})")
        rows.append([f"{rate:g}", steps, *(" / ".join(pair) for pair in found.values())])
    table(["lr", "steps", *found], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--val")
    parser.add_argument("--before", type=int, default=400, help="steps that make the base")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2, help=f"rows of {ROW} tokens per step")
    parser.add_argument("--val_rows", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    parser.add_argument("--out", help="a JSON file that holds what is known so far")
    options = parser.parse_args()
    head("What rounding leaves of a fine-tuning", torch.device("cpu"))
    if options.data is None:
        updates()
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        scratch = {"model.pretrained": bench.model, "model.from_scratch": "true", "model.min_learning_rate": 0}
        first = bench.fit("base", "before", options.before, 2 * options.batch, 3e-3, **scratch)
        bases = {"fp8": Path(folder) / "base_fp8", "bf16": Path(folder) / "base_bf16"}
        exported(first, bases["fp8"], "fp8")
        round_to_bf16(bases["fp8"], bases["bf16"])
        before = bench.loss(bases["fp8"])
        print(
            f"validation loss of the base: FP8 {before:.5f}, rounded to BF16 {bench.loss(bases['bf16']):.5f}\n",
            flush=True,
        )
        runs = [Run(b, rate, r) for rate in options.rates for b in bases for r in ("nearest", "stochastic")]
        rows: list[dict[str, Any]] = []
        for one in runs:
            found = measure(bench, one, bases)
            row: dict[str, Any] = {"base": one.base, "rate": one.rate, "rounding": one.rounding} | found
            for dtype in ("fp32", "bf16", "fp8"):
                out = Path(folder) / one.name / dtype
                row[dtype] = exported(Path(found["checkpoint"]), out, dtype) | {"loss": bench.loss(out)}
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            if options.out:
                Path(options.out).write_text(json.dumps({"before": before, "rows": rows}, indent=1))
        report(before, rows)


def round_to_bf16(source: Path, out: Path) -> None:
    """A Hugging Face directory's weights in BF16, all else as it is."""
    from safetensors.torch import save_file

    from src.weights.side_files import copy_side_files, read_config, write_config

    weights = HFDirectorySource(source)
    out.mkdir()
    copy_side_files(source, out)
    write_config(out, read_config(source), dtype="bf16", mtp_layers=0)
    tensors = {}
    for name in weights.names():
        shape = weights.shape(name)
        values = weights.read(name, 0, torch.Size(shape).numel()).view(shape)
        tensors[name] = values if name.endswith("bias") else values.bfloat16()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def report(before: float, rows: list[dict[str, Any]]) -> None:
    columns = [
        "lr",
        "base",
        "rounding",
        "masters' gain",
        "BF16 has",
        "FP8 has",
        "forward kept",
        "BF16 kept",
        "FP8 kept",
    ]
    lines = []
    for row in rows:
        gain = before - row["fp32"]["loss"]
        parts = [(before - row[dtype]["loss"]) / gain for dtype in ("bf16", "fp8")]
        kept = [row["forward"], row["bf16"]["kept"], row["fp8"]["kept"]]
        cells = [f"{part:.0%}" for part in (*parts, *kept)]
        lines.append([f"{row['rate']:g}", row["base"], row["rounding"], f"{gain:.5f}", *cells])
    table(columns, lines)


if __name__ == "__main__":
    main()
