"""The experts' products in FP8 beside bf16, with the casts: forward and the input's gradient, at DeepSeek-V3's widths.

    python -m benchmarks.fp8_experts [--experts 32] [--rows 128 256 512 1024 2048]      one GPU, under a minute
    python -m benchmarks.fp8_experts --device cpu --experts 2 --hidden 256 --intermediate 128 --rows 16 32

Operands are e4m3 with a scale per row of the left and per column of the right, over what the product sums. The input's
gradient sums over another dimension of the weights, so they are cast a second time and transposed. "whole" is what a
shard of experts multiplies in a micro-step: gate_up, down, gate_up again in the backward, the gradients of both inputs,
and in bf16 those of both weights. Activations are cast before each of the first five. Without FP8 products (CPU), cast
operands are multiplied as fp32: errors are true, times say nothing.

Legend: e experts of a shard, R rows per expert, M = e R rows.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import BF16, arguments, head, median_ms, relative, table

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
Cast = tuple[Tensor, Tensor]  # codes with the summed dimension last, and scales of all others
Product = Callable[[Cast, Cast, Tensor], Tensor]  # x [M, A], weights [e, B, A], ends of groups -> [M, B]


def cast(x: Tensor) -> Cast:
    """[..., A] -> e4m3 [..., A] and fp32 scales [...]."""
    largest = x.abs().amax(-1, keepdim=True).float()
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale.squeeze(-1)


def cast_transposed(weights: Tensor) -> Cast:
    """[e, A, B] -> e4m3 [e, B, A] and fp32 scales [e, B]."""
    codes, scale = cast(weights.mT)
    return codes.contiguous(), scale


def public(x: Cast, weights: Cast, ends: Tensor, fast: bool) -> Tensor:
    by_row = F.ScalingType.RowWise
    return F.scaled_grouped_mm(
        *(x[0], weights[0].mT, x[1], by_row, weights[1], by_row), offs=ends, output_dtype=BF16, use_fast_accum=fast
    )


def private(x: Cast, weights: Cast, ends: Tensor, fast: bool) -> Tensor:
    return torch._scaled_grouped_mm(
        x[0], weights[0].mT, x[1], weights[1], offs=ends, out_dtype=BF16, use_fast_accum=fast
    )


def emulated(x: Cast, weights: Cast, ends: Tensor) -> Tensor:
    left, right = x[0].float() * x[1][..., None], weights[0].float() * weights[1][..., None]
    return F.grouped_mm(left, right.mT, offs=ends).to(BF16)


def products(device: torch.device) -> dict[str, Product]:
    """Those that this PyTorch has on this device; says of each of the others why not."""
    found: dict[str, Product] = {}
    x, weights = (torch.randn(*shape, device=device).to(BF16) for shape in ((256, 256), (4, 128, 256)))
    ends = torch.arange(1, 5, device=device, dtype=torch.int32) * 64
    for name, fast in (("FP8, fast sums", True), ("FP8, fp32 sums", False)):
        for function in (public, private):
            run = partial(function, fast=fast)
            try:
                assert relative(run(cast(x), cast(weights), ends), F.grouped_mm(x, weights.mT, offs=ends)) < 0.1
                found[name] = run
                break
            except Exception as error:  # whatever it is, it is the finding
                reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "wrong result"
                print(f"{name}, {function.__name__}: {type(error).__name__}: {reason}")
    return found or {"FP8, emulated": emulated}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--experts", type=int, default=32, help="of a shard")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    options = parser.parse_args()
    device, experts = torch.device(options.device), options.experts
    torch.manual_seed(options.seed)
    head(f"Products in FP8, {experts} experts of {options.intermediate}, hidden {options.hidden}", device)
    available = products(device)
    to_fp8, to_fp8_transposed = cast, cast_transposed
    if device.type == "cuda":
        to_fp8, to_fp8_transposed = torch.compile(cast, dynamic=True), torch.compile(cast_transposed)
    gate_up = (0.02 * torch.randn(experts, 2 * options.intermediate, options.hidden, device=device)).to(BF16)
    down = (0.02 * torch.randn(experts, options.hidden, options.intermediate, device=device)).to(BF16)
    weights: dict[str, tuple[Tensor, Callable[[Tensor], Cast]]] = {  # and how they are cast
        "x gate_up^T": (gate_up, to_fp8),
        "a down^T": (down, to_fp8),
        "dy down": (down, to_fp8_transposed),
        "dh gate_up": (gate_up, to_fp8_transposed),
    }
    times = dict[str, float]()
    right = {name: how(weight) for name, (weight, how) in weights.items()}
    for name, (weight, how) in weights.items():
        times[f"cast weights {name}"] = median_ms(partial(how, weight), device)
    kinds, cells, whole = list(available), list[list[object]](), list[list[object]]()
    for rows in options.rows:
        ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * rows
        for name, (weight, how) in weights.items():
            operand = weight.mT if how is to_fp8 else weight  # [e, A, B]
            left = torch.randn(experts * rows, operand.shape[1], device=device).to(BF16)
            expected = F.grouped_mm(left, operand, offs=ends)
            times[f"bf16 {name}"] = median_ms(partial(F.grouped_mm, left, operand, offs=ends), device)
            times[f"cast rows {name}"] = median_ms(partial(to_fp8, left), device)
            line: list[object] = [rows, name, times[f"bf16 {name}"]]
            for kind, product in available.items():
                both = to_fp8(left), right[name]
                times[f"{kind} {name}"] = median_ms(partial(product, *both, ends), device)
                line += [times[f"{kind} {name}"], f"{relative(product(*both, ends), expected):.1e}"]
            cells.append([*line, times[f"cast rows {name}"], times[f"cast weights {name}"]])
            if (
                how is to_fp8_transposed
            ):  # the weights' gradient has the same operands: rows of the output and the input
                other = torch.randn(experts * rows, operand.shape[2], device=device).to(BF16)
                times[f"weights {name}"] = median_ms(partial(F.grouped_mm, left.mT, other, offs=ends), device)
        forward, gradient = ["x gate_up^T", "a down^T"], ["dy down", "dh gate_up"]
        for kind in kinds:
            line = [rows, kind]
            for names, rest in (
                (forward, 0.0),
                (gradient, 0.0),
                ([*forward, "x gate_up^T", *gradient], sum(times[f"weights {name}"] for name in gradient)),
            ):
                bf16, products_alone, rows_cast, weights_cast = (
                    sum(times[f"{what} {name}"] for name in names)
                    for what in ("bf16", kind, "cast rows", "cast weights")
                )
                totals = [products_alone, products_alone + rows_cast, products_alone + rows_cast + weights_cast]
                line.append(" / ".join(f"{(bf16 + rest) / (total + rest):.2f}" for total in totals))
            whole.append(line)
    errors = [part for kind in kinds for part in (f"{kind} ms", "off from bf16 by")]
    table(["rows per expert", "product", "bf16 ms", *errors, "cast of rows ms", "of weights ms"], cells)
    print("How many times as fast as bf16: products alone / with rows cast / with rows and weights cast.\n")
    table(["rows per expert", "products", "forward", "input's gradient", "whole"], whole)


if __name__ == "__main__":
    main()
