"""What the host does beside the GPU: tokenising, packing and loading rows, and the optimizer in host memory.

    python -m benchmarks.host --data FILE.jsonl [--tokenizer deepseek] [--max_length 32768] [--parameters 200000000]

A GPU takes a packed row of 32k tokens in tens of seconds for 61 layers; rows must come faster than that, and the
optimizer's time is to be set beside a step's.
"""

import argparse
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from benchmarks.common import table
from src.datamodules import SFTDataModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", default="deepseek")
    parser.add_argument("--max_length", type=int, default=32768)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--parameters", type=int, default=200_000_000)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = SFTDataModule(
            train_files=[options.data],
            tokenizer=options.tokenizer,
            max_length=options.max_length,
            cache_dir=str(Path(folder)),
            num_workers=options.workers,
        )
        data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        began = time.perf_counter()
        data.prepare_data()
        data.setup("fit")
        seconds = time.perf_counter() - began
        loader = data.train_dataloader()
        began, tokens, count = time.perf_counter(), 0, 0
        first = None
        for batch in loader:
            first = first or time.perf_counter() - began
            tokens += len(batch["input_ids"])
            count += 1
        took = time.perf_counter() - began
        rows.append(["tokenise, mask and pack", f"{tokens / seconds:.3g} tokens/s, {seconds:.1f} s in all"])
        rows.append([f"first batch, {options.workers} workers", f"{first or 0:.2f} s"])
        rows.append(
            [f"{count} batches of up to {options.max_length} tokens", f"{1e3 * took / max(count, 1):.2f} ms each"]
        )

    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameter = torch.nn.Parameter(torch.zeros(options.parameters))
    optimizer = DeepSpeedCPUAdam([parameter], lr=1e-5, adamw_mode=True)
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
    rate = options.parameters / sorted(times)[2]
    rows.append([f"DeepSpeedCPUAdam, {torch.get_num_threads()} threads", f"{rate / 1e9:.2f} G parameters/s"])
    rows.append(["its step for 671e9 / 256 parameters", f"{671e9 / 256 / rate:.2f} s"])
    table(["", ""], rows)


if __name__ == "__main__":
    main()
