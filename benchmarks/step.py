"""Whole steps through Lightning, DeepSpeed ZeRO-3 and our strategy on one device, at DeepSeek-V3's layer widths.

    python -m benchmarks.step [--place host|optimizer|device] [--layers 2] [--experts 32] [--accumulate 4] [--trace F]

--place: what is in host memory. `host`: parameters and optimizer, so that each gather is a copy over PCIe, as long as
one over the network of a large cluster; `optimizer`: its states alone; `device`: nothing.

The same model without engine, callbacks and optimizer is measured first, in the same process, on the same batches. MFU
counts useful operations (src/models/deepseek_v3/flops.py), of 989 TFLOP/s. One JSON line a row ends the output.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import BF16, PEAK, TRUE_CONFIG, arguments, head, randomise, table
from src.callbacks.expert_load import ExpertLoad
from src.callbacks.loss_spike import LossSpike
from src.callbacks.throughput import Throughput
from src.datamodules.collate import Document, collate
from src.models.deepseek_v3 import DeepseekV3ForCausalLM, LossWeights, load_config
from src.models.deepseek_v3.flops import step_flops
from src.models.sft_module import SFTModule
from src.strategies import DeepSpeedSPStrategy
from src.strategies.parallelize import apply_activation_checkpointing


def write_config(folder: Path, options: argparse.Namespace) -> str:
    fields = json.loads((Path(options.model) / "config.json").read_text())
    changes = {"num_hidden_layers": options.layers, "n_routed_experts": options.experts, "vocab_size": options.vocab}
    fields |= {name: value for name, value in changes.items() if value}
    if options.layers:
        fields["first_k_dense_replace"] = min(options.dense, options.layers)
    fields["num_nextn_predict_layers"] = 0
    fields.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


class RandomRows(Dataset[dict[str, Any]]):
    """`steps` optimizer steps of each mix of lengths, every token a target."""

    def __init__(self, mixes: list[list[int]], steps: int, accumulate: int, vocab: int) -> None:
        self.order = [mix for mix in mixes for _ in range(steps * accumulate)]
        self.accumulate, self.vocab = accumulate, vocab

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        lengths, random = self.order[index], np.random.default_rng(index)
        documents = [
            Document(
                random.integers(0, self.vocab, n).astype(np.int32), np.array([[0, n]], np.int32), f"random:{index}"
            )
            for n in lengths
        ]
        batch = collate(documents, 1)
        targets = int((batch["labels"] >= 0).sum())
        return batch | {
            "step_tokens": sum(lengths) * self.accumulate,
            "step_targets": targets * self.accumulate,
            "step_mtp_targets": 1,
        }


class Stopwatch(pl.Callback):
    """Times of each micro-step's forward, backward and the rest, by events, and of each optimizer step by the clock."""

    def __init__(self, accumulate: int, trace: str | None, traced_step: int) -> None:
        self.accumulate, self.trace, self.traced_step = accumulate, trace, traced_step
        self.marks: list[list[Any]] = []
        self.seconds: list[float] = []
        self.between = 0
        self.memory: list[dict[str, float]] = []
        self.profiler: Any = None

    def _mark(self) -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.accumulate == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                self.between = torch.cuda.memory_allocated()
            if self.trace and batch_idx // self.accumulate == self.traced_step:
                self.profiler = torch.profiler.profile()
                self.profiler.__enter__()
            self.began = time.perf_counter()
        self.marks.append([self._mark()])

    def on_before_backward(self, *_: Any) -> None:
        self.marks[-1].append(self._mark())

    def on_after_backward(self, *_: Any) -> None:
        self.marks[-1].append(self._mark())

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.marks[-1].append(self._mark())
        if (batch_idx + 1) % self.accumulate == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                named = {"between_steps_gib": self.between, "peak_gib": peak, "reserved_gib": reserved}
                self.memory.append({name: size / 2**30 for name, size in named.items()})
            self.seconds.append(time.perf_counter() - self.began)
            print(f"step {len(self.seconds)}: {self.seconds[-1]:.2f} s", flush=True)
            if self.profiler is not None:
                self.profiler.__exit__(None, None, None)
                self.profiler.export_chrome_trace(self.trace)
                self.profiler = None

    def milliseconds(self, micro_step: int) -> list[float]:
        """Forward, backward, and what follows: the optimizer where it steps, callbacks and logging."""
        marks = self.marks[micro_step]
        if isinstance(marks[0], float):
            return [1e3 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
        return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


class QuickStart(DeepSpeedSPStrategy):
    """Random weights made on the device: the strategy's own, the same on every layout, take the host half a minute."""

    def initialise(self, model: DeepseekV3ForCausalLM, seed: int) -> None:
        for name, parameter in model.named_parameters():
            part = getattr(parameter, "ds_tensor", parameter).data
            values = torch.empty(part.shape, device=self.root_device, dtype=part.dtype).normal_(0, 0.02)
            part.copy_(values + 1 if name.endswith("norm.weight") else values)


class Bare(nn.Module):
    """The model on the device, no engine: forward and backward of a micro-step."""

    def __init__(self, directory: str, options: argparse.Namespace, device: torch.device) -> None:
        super().__init__()
        with torch.device("meta"):
            model = DeepseekV3ForCausalLM(load_config(directory), options.experts_per_shard)
        dtype = BF16 if device.type == "cuda" else torch.float32
        randomise(model, device, dtype)
        model.set_attention_kernel("auto")
        model.set_kept(options.attention_output, options.layer_input)
        apply_activation_checkpointing(model)
        self.model, self.device = model, device

    def micro_step(self, batch: dict[str, Any]) -> tuple[float, float]:
        """Forward and backward in ms."""
        names = ("input_ids", "labels", "cu_seqlens", "max_seqlen", "document_ids")
        given = {name: batch[name] for name in names}
        given = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        self.model.zero_grad(set_to_none=True)
        cuda = self.device.type == "cuda"
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)] if cuda else []
        times = [time.perf_counter()]
        if cuda:
            marks[0].record()
        loss = self.model(**given, weights=LossWeights(1 / batch["step_targets"])).loss
        times.append(time.perf_counter())
        if cuda:
            marks[1].record()
        loss.backward()
        times.append(time.perf_counter())
        if cuda:
            marks[2].record()
            torch.cuda.synchronize()
            return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])
        return 1e3 * (times[1] - times[0]), 1e3 * (times[2] - times[1])


def mixes_of(texts: list[str]) -> Iterator[list[int]]:
    for text in texts:
        count, length = text.split("x")
        yield [int(length)] * int(count)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default=str(TRUE_CONFIG))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dense", type=int, default=0)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--experts_per_shard", type=int, default=16)
    parser.add_argument("--mixes", nargs="*", default=["1x32768", "8x4096"])
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps for each mix, the first of which warms up"
    )
    parser.add_argument("--place", choices=["host", "optimizer", "device"], default="host")
    parser.add_argument("--attention_output", choices=["keep", "offload", "recompute"], default="keep")
    parser.add_argument("--layer_input", choices=["keep", "offload"], default="keep")
    parser.add_argument("--no-bare", action="store_true")
    parser.add_argument("--trace", help="write one optimizer step of the first mix for Perfetto")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    mixes, steps = list(mixes_of(options.mixes)), options.steps
    with tempfile.TemporaryDirectory() as folder:
        directory = write_config(Path(folder), options)
        config = load_config(directory)
        rows = RandomRows(mixes, steps, options.accumulate, config.vocab_size)
        head(
            f"Steps of {config.num_hidden_layers} layers of {config.n_routed_experts} experts, {vars(options)}", device
        )
        bare: dict[int, tuple[float, float]] = {}
        if not options.no_bare:
            model = Bare(directory, options, device)
            for index in range(len(mixes)):
                batch = rows[index * steps * options.accumulate]
                times = [model.micro_step(batch) for _ in range(5)][2:]
                bare[index] = statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()
        watch = Stopwatch(options.accumulate, options.trace, steps - 1)
        module = SFTModule(
            directory,
            from_scratch=True,
            experts_per_shard=options.experts_per_shard,
            attention_output=options.attention_output,
            layer_input=options.layer_input,
            mtp_loss_weight=0.0,
        )
        started = time.perf_counter()
        trainer = pl.Trainer(
            accelerator=device.type,
            devices=1,
            precision="bf16-true" if device.type == "cuda" else "32-true",
            strategy=QuickStart(
                offload_optimizer=options.place != "device", offload_parameters=options.place == "host"
            ),
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=1.0,
            max_epochs=1,
            use_distributed_sampler=False,  # which would shuffle
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Throughput(), ExpertLoad(), LossSpike(), watch],
            default_root_dir=folder,
        )
        print("the engine comes", flush=True)
        trainer.fit(module, DataLoader(rows, batch_size=None, num_workers=1, pin_memory=device.type == "cuda"))
        print(f"the whole run, set-up included: {time.perf_counter() - started:.0f} s")
    assert module.model is not None
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in module.model.parameters())
    print(f"{parameters / 1e9:.2f} G parameters\n", flush=True)
    lines, cells = [], []
    for index, (name, lengths) in enumerate(zip(options.mixes, mixes, strict=True)):
        first = index * steps * options.accumulate
        steady = range(first + options.accumulate, first + steps * options.accumulate)  # without the mix's first step
        every = {i: watch.milliseconds(i) for i in steady}
        inner = [every[i] for i in steady if (i + 1) % options.accumulate]
        last = [every[i] for i in steady if (i + 1) % options.accumulate == 0]
        forward, backward = (statistics.median(t[k] for t in every.values()) for k in (0, 1))
        seconds = statistics.median(watch.seconds[index * steps + 1 : (index + 1) * steps])
        flops = step_flops(config, lengths, sum(lengths) - len(lengths))
        line: dict[str, Any] = {
            "mix": name,
            "place": options.place,
            "parameters": parameters,
            "forward_ms": forward,
            "backward_ms": backward,
            "after_micro_step_ms": statistics.median(t[2] for t in inner) if inner else 0.0,
            "optimizer_and_after_ms": statistics.median(t[2] for t in last),
            "step_s": seconds,
            "mfu_forward_backward": flops / (forward + backward) * 1e3 / PEAK,
            "mfu_step": flops * options.accumulate / seconds / PEAK,
            "tokens_per_s": sum(lengths) * options.accumulate / seconds,
            "options": vars(options),
        }
        memory = watch.memory[index * steps : (index + 1) * steps]
        line |= {name: max(m[name] for m in memory) for name in memory[0]} if memory else {}
        if index in bare:
            line |= {"bare_forward_ms": bare[index][0], "bare_backward_ms": bare[index][1]}
            line["mfu_bare"] = flops / sum(bare[index]) * 1e3 / PEAK
        lines.append(line)
        for what, ms in (
            ("forward, no engine", line.get("bare_forward_ms")),
            ("backward, no engine", line.get("bare_backward_ms")),
            ("forward", forward),
            ("backward, gradients reduced", backward),
            ("callbacks and logging after a micro-step", line["after_micro_step_ms"]),
            ("optimizer, callbacks and logging after the last", line["optimizer_and_after_ms"]),
        ):
            if ms is not None:
                cells.append([name, what, f"{ms:.1f}"])
        for what, key in (
            ("MFU, no engine", "mfu_bare"),
            ("MFU, forward and backward", "mfu_forward_backward"),
            (f"MFU, the whole step of {options.accumulate}", "mfu_step"),
        ):
            if key in line:
                cells.append([name, what, f"{line[key]:.1%}"])
        cells.append([name, "tokens/s", f"{line['tokens_per_s']:.0f}"])
        for what, key in (
            ("between steps, GiB", "between_steps_gib"),
            ("peak, GiB", "peak_gib"),
            ("reserved by the allocator, GiB", "reserved_gib"),
        ):
            if key in line:
                cells.append([name, what, f"{line[key]:.1f}"])
    table(["documents", "", "ms"], cells)
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
