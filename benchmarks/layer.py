"""One whole DeepSeek-V3 MoE layer under activation checkpointing: ours, transformers' and the guide's, one run.

    python -m benchmarks.layer [--others] [--profile FOLDER]

MFU counts useful operations (src/models/deepseek_v3/flops.py), of 989 TFLOP/s.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config

from benchmarks.common import BF16, PEAK, arguments, head, median_ms, peak_gib, randomise, relative, table, true_config
from benchmarks.guide import LoopOverExperts
from src.models.deepseek_v3.attention import Attention
from src.models.deepseek_v3.flops import FORWARD_AND_BACKWARD, attention_flops, layer_weights
from src.models.deepseek_v3.layers import DecoderLayer
from src.models.deepseek_v3.moe import MoE
from src.models.deepseek_v3.recompute import Kept, recompute
from src.models.deepseek_v3.rope import cos_sin, positions
from src.models.deepseek_v3.row import RowGeometry
from src.models.offload import HostStack

MIXES = {
    "1 x 32768": [32768],
    "8 x 4096": [4096] * 8,
    "4 x 4096": [4096] * 4,
    "1 x 8192": [8192],
}
Step = Callable[[], Tensor]


def build(config: DeepseekV3Config, shards: int, device: torch.device) -> DecoderLayer:
    with torch.device("meta"):
        layer = DecoderLayer(config, config.first_k_dense_replace, config.n_routed_experts // shards)
    randomise(layer, device, BF16)
    return layer


def geometry(config: DeepseekV3Config, lengths: list[int], device: torch.device) -> RowGeometry:
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    tokens = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    documents = (torch.arange(len(lengths), device=device)[:, None] == document).float()
    angles = cos_sin(config, positions(bounds, tokens))
    return RowGeometry(bounds, max(lengths), *angles, documents, torch.tensor(lengths, device=device).float())


def run_checkpointed(layer: nn.Module, *args: Any) -> Any:
    context = lambda: (contextlib.nullcontext(), recompute())  # noqa: E731
    return checkpoint(layer, *args, use_reentrant=False, context_fn=context, preserve_rng_state=False)


def set_kept(layer: DecoderLayer, mode: str, host: HostStack) -> None:
    for module in layer.modules():
        if isinstance(module, Attention):
            module.kept = None if mode == "recompute" else Kept(host if mode == "offload" else None)
        elif isinstance(module, MoE):
            module.kept = Kept(None)


def our_step(layer: DecoderLayer, x: Tensor, grad: Tensor, row: RowGeometry, host: HostStack | None = None) -> Tensor:
    layer.zero_grad(set_to_none=True)
    x.grad = None
    hooks = (
        saved_tensors_hooks(lambda t: host.put(t) if t.numel() else t, host.take) if host else contextlib.nullcontext()
    )
    with hooks:
        out, _ = run_checkpointed(layer, x, row)
    out.backward(grad)
    return out.detach()


def stack_experts(layer: DecoderLayer) -> dict[str, Tensor]:
    """All experts' weights in one tensor each, of which the shards' become views: no second copy stays."""
    stacked = {}
    for name in ("gate_up_proj", "down_proj"):
        parts = [getattr(shard, name) for shard in layer.mlp.experts]
        whole = torch.empty(sum(len(p) for p in parts), *parts[0].shape[1:], device=parts[0].device, dtype=BF16)
        for part, view in zip(parts, whole.split([len(p) for p in parts]), strict=True):
            part.grad = None
            view.copy_(part.data)
            part.data = view
        stacked[f"mlp.experts.{name}"] = whole
    return stacked


def theirs(config: DeepseekV3Config, layer: DecoderLayer, stacked: dict[str, Tensor], attention: str) -> nn.Module:
    """transformers' layer with our weights, its experts by grouped_mm."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

    config._attn_implementation, config._experts_implementation = attention, "grouped_mm"
    with torch.device("meta"):
        other = DeepseekV3DecoderLayer(config, config.first_k_dense_replace)
    ours = {name: value.detach() for name, value in (*layer.named_parameters(), *layer.named_buffers())} | stacked
    for name, _ in list(other.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(owner), leaf, nn.Parameter(ours[name]))
    for name, _ in list(other.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(owner), leaf, ours[name].clone())
    return other


def their_step(config: DeepseekV3Config, layer: nn.Module, x: Tensor, grad: Tensor, row: RowGeometry) -> Tensor:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    place = torch.arange(len(x), device=x.device)[None]
    angles = DeepseekV3RotaryEmbedding(config, device=x.device)(x[None], place)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    call = partial(layer, attention_mask=None, position_ids=place, position_embeddings=angles)
    out = checkpoint(call, x[None], use_reentrant=False)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(grad[None])
    return out.detach()[0]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mixes", nargs="*", default=list(MIXES))
    parser.add_argument("--kept", nargs="*", default=["keep"], choices=["keep", "offload", "recompute", "all-offload"])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--others", action="store_true", help="transformers' and the guide's too, at 8192 tokens")
    parser.add_argument("--profile", type=Path, help="folder for a trace of the first mix; prints its largest kernels")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    config = true_config()
    head(f"One MoE layer, {config.n_routed_experts} experts in {options.shards} shards, checkpointed, bf16", device)
    layer, host = build(config, options.shards, device), HostStack()
    rows: list[list[object]] = []

    def measure(label: str, mix: str, step: Step) -> None:
        lengths = MIXES[mix]
        work = FORWARD_AND_BACKWARD * (
            2 * sum(lengths) * layer_weights(config, False) + attention_flops(config, lengths)
        )
        ms = median_ms(step, device)
        peak = peak_gib(step, device)  # gradients of the weights are there before
        rate = work / ms * 1e3
        rows.append([label, mix, f"{ms:.1f}", f"{rate / 1e12:.0f}", f"{rate / PEAK:.1%}", f"{peak:.1f}"])
        print(rows[-1], flush=True)

    for mix in options.mixes:
        lengths = MIXES[mix]
        row = geometry(config, lengths, device)
        x = torch.randn(sum(lengths), config.hidden_size, device=device, dtype=BF16).requires_grad_()
        grad = 0.01 * torch.randn_like(x)
        for kept in options.kept:
            set_kept(layer, kept.removeprefix("all-"), host)
            measure(
                f"ours, {kept}", mix, partial(our_step, layer, x, grad, row, host if kept == "all-offload" else None)
            )
    if options.profile:
        lengths = MIXES[options.mixes[0]]
        row = geometry(config, lengths, device)
        x = torch.randn(sum(lengths), config.hidden_size, device=device, dtype=BF16).requires_grad_()
        grad = 0.01 * torch.randn_like(x)
        set_kept(layer, options.kept[0], host)
        our_step(layer, x, grad, row)
        with torch.profiler.profile() as profile:
            our_step(layer, x, grad, row)
            torch.cuda.synchronize()
        options.profile.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(options.profile / "layer.json.gz"))
        kernels: dict[str, list[float]] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kernels.setdefault(event.name[:90], []).append(event.device_time_total / 1e3)
        largest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:32]
        table(["kernel", "calls", "ms"], [[name.replace("|", "/"), len(t), f"{sum(t):.2f}"] for name, t in largest])
    if options.others:
        mix = "1 x 8192"
        row = geometry(config, MIXES[mix], device)
        x = torch.randn(sum(MIXES[mix]), config.hidden_size, device=device, dtype=BF16).requires_grad_()
        grad = 0.01 * torch.randn_like(x)
        set_kept(layer, "keep", host)
        out = our_step(layer, x, grad, row).cpu()
        dx = x.grad
        assert dx is not None
        dx, stacked = dx.cpu(), stack_experts(layer)
        layer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        for attention in ("sdpa", "flash_attention_4"):
            try:
                other = theirs(true_config(), layer, stacked, attention)
                same = their_step(true_config(), other, x, grad, row)
            except (ImportError, ValueError, KeyError, RuntimeError, AttributeError) as problem:
                rows.append([f"transformers, {attention}", mix, f"fails: {str(problem)[:80]}", "", "", ""])
                continue
            assert x.grad is not None
            difference = f"{relative(same, out):.1e}, {relative(x.grad, dx):.1e}"
            other.zero_grad(set_to_none=True)
            label = f"transformers, {attention} (output, dx differ by {difference})"
            measure(label, mix, partial(their_step, true_config(), other, x, grad, row))
            other.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        layer.mlp.experts = LoopOverExperts(layer.mlp.experts)  # type: ignore[assignment]
        layer.self_attn.kernel = "varlen"
        set_kept(layer, "recompute", host)
        same = our_step(layer, x, grad, row)
        difference = f"{relative(same, out):.1e}"
        measure(f"the guide's way (output differs by {difference})", mix, partial(our_step, layer, x, grad, row))
    table(["", "documents", "ms", "TFLOP/s", "MFU", "peak GiB over weights and gradients"], rows)


if __name__ == "__main__":
    main()
