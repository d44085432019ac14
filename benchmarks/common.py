"""What every benchmark shares: the device, its measured ceilings, medians of event times, tables."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.markdown import markdown

if TYPE_CHECKING:
    from transformers import DeepseekV3Config

PEAK = 989e12  # dense bf16 operations a second that NVIDIA states for H100 SXM; MFU is of this
TRUE_CONFIG = Path(__file__).parent.parent / "configs" / "models" / "deepseek-v3"
BF16 = torch.bfloat16


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def true_config(**changes: int) -> "DeepseekV3Config":
    """DeepSeek-V3's own config.json, its 61 layers or experts cut where asked."""
    from src.models.deepseek_v3 import load_config  # here, so that a benchmark of torch alone needs nothing else

    config = load_config(str(TRUE_CONFIG))
    for name, value in changes.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return config


def randomise(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives a model that was built on the meta device random weights, norms of about one, and buffers of zeros."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.empty(parameter.shape, device=device, dtype=dtype).normal_(0, 0.02)
            setattr(module, name, nn.Parameter(value + 1 if "norm" in type(module).__name__.lower() else value))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))


def median_ms(run: Callable[[], object], device: torch.device, repeats: int = 7, warm_up: int = 2) -> float:
    """Median of single runs, by events on a CUDA device."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(stop))
        else:
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def peak_gib(run: Callable[[], object], device: torch.device) -> float:
    """Most device memory beyond what is there before, in GiB; nan on the CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def relative(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|; nan where anything is not finite."""
    reference = reference.to(ours.device).float()
    return float((ours.float() - reference).norm() / reference.norm())


def head(title: str, device: torch.device) -> None:
    """Prints what was measured on, with the chip's ceilings as they are now."""
    packages = ["torch", "triton", "transformers", "deepspeed", "lightning", "flash-attn-4"]
    found = [f"python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    print(f"\n### {title}\n\n{', '.join(found)}")
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=BF16)
        rate = 2 * 8192**3 / median_ms(lambda: a @ a, device, 20) / 1e9
        source = torch.empty(2**30, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        copy = 2 * 2**30 / median_ms(lambda: target.copy_(source), device, 20) / 1e9
        print(
            f"\n{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}: product of 8192 x 8192 bf16 "
            f"{rate:.0f} TFLOP/s, copy {copy:.2f} TB/s"
        )
    print(flush=True)


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    cells = ([f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)
    print("\n".join(markdown(columns, cells)), end="\n\n", flush=True)
