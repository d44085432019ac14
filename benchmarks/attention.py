"""Causal attention of packed documents at DeepSeek-V3's head sizes (192, 128): which kernel, forward and backward.

    python -m benchmarks.attention [--tiles]

Each kernel is first compared with fp64 on short documents. `--tiles` tries other tiles in flash-attn-4's backward.
"""

import torch
from torch import Tensor

from benchmarks.common import BF16, arguments, head, median_ms, relative, table
from src.models.kernels import ATTENTION, AttentionKernel, Packing, resolve_attention

MIXES = {
    "1 x 32768": [32768],
    "1 x 8192": [8192],
    "8 x 4096": [4096] * 8,
    "16k ... 256": [16384, 8192, 4096, 2048, 1024, 512, 256, 256],
    "64 x 512": [512] * 64,
}


def inputs(lengths: list[int], heads: int, device: torch.device) -> tuple[list[Tensor], Packing, Tensor]:
    tokens = sum(lengths)
    q, k = (torch.randn(tokens, heads, 192, device=device, dtype=BF16).requires_grad_() for _ in range(2))
    v = torch.randn(tokens, heads, 128, device=device, dtype=BF16).requires_grad_()
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return [q, k, v], Packing(bounds, max(lengths), 192**-0.5), torch.randn_like(v)


def flops(lengths: list[int], heads: int) -> int:
    return 3 * sum(n * n for n in lengths) * heads * (192 + 128)


def errors(kernel: AttentionKernel, device: torch.device, lengths: list[int]) -> list[float]:
    """Of the output and the three gradients against fp64, document by document."""
    (q, k, v), packing, grad = inputs(lengths, 2, device)
    results = kernel.forward(q.detach(), k.detach(), v.detach(), packing)
    ours = [results[0], *kernel.backward(grad, q.detach(), k.detach(), v.detach(), results, packing)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    outs = []
    for a, b, c in zip(*(x.split(lengths) for x in exact), strict=True):
        scores = torch.einsum("qhd,khd->hqk", a, b) * packing.scale
        mask = torch.ones(scores.shape[1:], dtype=torch.bool, device=device).tril()
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), c))
    out = torch.cat(outs)
    return [relative(a, b) for a, b in zip(ours, [out, *torch.autograd.grad(out, exact, grad.double())], strict=True)]


def times(kernel: AttentionKernel, lengths: list[int], heads: int, device: torch.device) -> tuple[float, float]:
    (q, k, v), packing, grad = inputs(lengths, heads, device)
    q, k, v = (x.detach() for x in (q, k, v))
    results = kernel.forward(q, k, v, packing)
    forward = median_ms(lambda: kernel.forward(q, k, v, packing), device)
    if type(kernel).backward is AttentionKernel.backward:  # runs the forward again
        x = [t.requires_grad_() for t in (q, k, v)]
        out = kernel(*x, packing)
        backward = median_ms(lambda: torch.autograd.grad(out, x, grad, retain_graph=True), device)
    else:
        backward = median_ms(lambda: kernel.backward(grad, q, k, v, results, packing), device)
    return forward, backward


def both(kernel: AttentionKernel, lengths: list[int], heads: int, device: torch.device) -> float:
    """One run forward and backward without warm-up, in ms."""
    x, packing, grad = inputs(lengths, heads, device)
    return median_ms(lambda: kernel(*x, packing).backward(grad), device, repeats=1, warm_up=0)


def tiles(device: torch.device, heads: int) -> None:
    """flash-attn-4's backward for (192, 128) under other tiles, all that its own search calls feasible."""
    from flash_attn.cute import interface

    config, original = interface.BwdConfig, interface._tile_size_bwd_sm90
    standard = original(192, 128, True, False)
    changes: list[dict[str, object]] = [
        {},
        {"n_block_size": 112, "num_stages_dO": 1},
        {"n_block_size": 112, "num_stages_dO": 1, "dQ_swapAB": True, "AtomLayoutMdQ": 2},
        {"dQ_swapAB": True, "AtomLayoutMdQ": 2},
        {"num_wg": 3, "AtomLayoutNdKV": 3},
        {"n_block_size": 80},
        {"m_block_size": 80, "n_block_size": 64, "SdP_swapAB": True, "dKV_swapAB": False, "AtomLayoutMSdP": 2,
         "AtomLayoutNdKV": 1},
    ]  # fmt: skip
    rows = []
    kernel = ATTENTION["flash_attn_4"]
    for change in changes:
        tile = config(**{**standard.__dict__, **change})
        interface._tile_size_bwd_sm90 = lambda *args, tile=tile, **kwargs: tile
        label = ", ".join(f"{key}={value}" for key, value in change.items()) or f"as it comes: {standard}"
        try:
            error = max(errors(kernel, device, [300, 1, 77]))
            one = times(kernel, [32768], heads, device)[1]
            many = times(kernel, [4096] * 8, heads, device)[1]
            rows.append([label, f"{one:.1f}", f"{many:.2f}", error])
        except Exception as problem:  # a benchmark of what a library says it cannot do goes on and says so
            rows.append([label, "fails", type(problem).__name__, str(problem).split("\n")[0][:60]])
        print(rows[-1], flush=True)
    interface._tile_size_bwd_sm90 = original
    table(["tile", "backward ms, 1 x 32768", "8 x 4096", "largest error"], rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kernels", nargs="*", default=list(ATTENTION))
    parser.add_argument("--tiles", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    head(f"Attention (192, 128), {options.heads} heads, bf16, packed", device)
    if options.tiles:
        tiles(device, options.heads)
        return
    rows = []
    for name in options.kernels:
        try:
            kernel = resolve_attention(name, device, BF16)
        except ValueError as problem:
            rows.append([name, str(problem), "", "", "", ""])
            continue
        worst = max(e for e in errors(kernel, device, [300, 1, 77, 129]) if e == e)
        assert worst < 1e-2, f"{name} is off by {worst}"
        for mix, lengths in MIXES.items():
            forward, backward = times(kernel, lengths, options.heads, device)
            rate = flops(lengths, options.heads) / (forward + backward) / 1e9
            rows.append([name, mix, f"{forward:.2f}", f"{backward:.2f}", f"{forward + backward:.1f}", f"{rate:.0f}"])
        mixture = [int(n) for n in torch.randint(200, 900, (40,))]
        first, again = (both(kernel, mixture, options.heads, device) for _ in range(2))
        rows.append([name, "lengths never seen before", "", "", f"{first:.1f}", f"then {again:.1f} ms"])
        rows.append([name, "largest error against fp64", f"{worst:.1e}", "", "", ""])
    table(["kernel", "documents", "forward ms", "backward ms", "both", "TFLOP/s"], rows)


if __name__ == "__main__":
    main()
