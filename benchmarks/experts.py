"""The routed experts of one layer at DeepSeek-V3's widths: dispatch, products, SwiGLU, combine, forward and backward.

    python -m benchmarks.experts [--tokens 8192 16384 32768]

gate_up is computed again in the backward pass and counted once: useful operations are 18 T K H I.
"""

import torch
from torch import Tensor

from benchmarks.common import BF16, arguments, head, median_ms, peak_gib, relative, table
from benchmarks.guide import LoopOverExperts
from src.models.deepseek_v3.experts import Experts
from src.models.kernels import pointwise

H, I, E, K = 7168, 2048, 256, 8  # noqa: E741 (the field's letters)


def build(shards: int, device: torch.device) -> Experts:
    experts = Experts(E, E // shards, H, I).to(BF16).to(device)
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.02)
    return experts


def routing(kind: str, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Chosen experts and weights [T, K]. skewed: popularity falls as 1/rank. half: every second expert gets nothing."""
    popularity = torch.zeros(E, device=device)
    if kind == "skewed":
        popularity = -torch.arange(1, E + 1, device=device).log()
    elif kind == "half":
        popularity[::2] = float("-inf")
    gumbel = -(-torch.rand(tokens, E, device=device).clamp(1e-9, 1 - 1e-7).log()).log()
    chosen = (popularity + gumbel).topk(K, -1).indices  # K without replacement, by popularity
    return chosen, torch.rand(tokens, K, device=device)


def forward(experts: Experts | LoopOverExperts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out: Tensor = experts(x, weights, experts.set_out(x, weights, experts.route(chosen)))  # type: ignore[arg-type]
    return out


def run(experts: Experts | LoopOverExperts, x: Tensor, chosen: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    for parameter in experts.parameters():
        parameter.grad = None
    x.grad = weights.grad = None
    out = forward(experts, x, weights, chosen)
    out.backward(grad)
    assert x.grad is not None and weights.grad is not None
    return [out.detach(), x.grad, weights.grad]


def reference(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of x and weights, in fp32, expert by expert."""
    x, weights = x.detach().float().requires_grad_(), weights.detach().requires_grad_()
    dx, dw, out = torch.zeros_like(x), torch.zeros_like(weights), torch.zeros_like(x)
    matrices = [pair for s in experts for pair in zip(s.gate_up_proj, s.down_proj, strict=True)]
    for index, (gate_up, down) in enumerate(matrices):
        tokens, place = torch.where(chosen == index)
        gate, up = torch.nn.functional.linear(x[tokens], gate_up.detach().float()).chunk(2, -1)
        y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down.detach().float())
        y = y * weights[tokens, place, None]
        a, b = torch.autograd.grad(y, [x, weights], grad.float()[tokens])
        dx, dw = dx + a, dw + b
        out.index_add_(0, tokens, y.detach())
    return [out, dx, dw]


def inputs(kind: str, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, chosen, weights and the output's gradient."""
    chosen, weights = routing(kind, tokens, device)
    x = torch.randn(tokens, H, device=device, dtype=BF16).requires_grad_()
    return x, chosen, weights.requires_grad_(), torch.randn(tokens, H, device=device, dtype=BF16)


def check(experts: Experts, kind: str, device: torch.device) -> float:
    """Two runs equal to the bit, and the largest error against fp32."""
    given = inputs(kind, 611, device)
    first, gradients = run(experts, *given), [p.grad for p in experts.parameters()]
    second = run(experts, *given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"
    for one, parameter in zip(gradients, experts.parameters(), strict=True):
        assert one is not None and parameter.grad is not None and torch.equal(one, parameter.grad)
    worst = max(relative(a, b) for a, b in zip(first, reference(experts, *given), strict=True))
    assert worst < 1e-2, f"{kind}: off by {worst}"
    return worst


def measure(experts: Experts | LoopOverExperts, tokens: int, kind: str, device: torch.device) -> list[str]:
    """Cells of a row: forward ms, forward and backward ms, useful TFLOP/s, peak memory."""
    given = inputs(kind, tokens, device)
    x, chosen, weights, _ = given
    with torch.no_grad():
        once = median_ms(lambda: forward(experts, x, weights, chosen), device, 3)
    both = median_ms(lambda: run(experts, *given), device)
    peak = peak_gib(lambda: run(experts, *given), device)  # the weights' gradients are there before
    return [f"{once:.1f}", f"{both:.1f}", f"{18 * tokens * K * H * I / both / 1e9:.0f}", f"peak {peak:.1f} GiB"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 16384, 32768])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--guide", action="store_true", help="the loop over experts too, at 8192 tokens: seconds a run")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    head(f"Routed experts: {E} of {I} in {options.shards} shards, hidden {H}, top {K}, bf16", device)
    experts = build(options.shards, device)
    for kind in ("even", "skewed", "half"):
        print(f"{kind}: error {check(experts, kind, device):.1e}, two runs equal to the bit", flush=True)
    rows = []
    for tokens in options.tokens:
        for kind in ("even", "skewed", "half") if tokens == 16384 else ("even",):
            rows.append(["ours", f"{tokens} {kind}", *measure(experts, tokens, kind, device)])
        fast, pointwise._fast = pointwise._fast, lambda x: False
        rows.append(["plain PyTorch between the products", f"{tokens} even", *measure(experts, tokens, "even", device)])
        pointwise._fast = fast
    if options.guide:
        rows.append(["the guide's loop", "8192 even", *measure(LoopOverExperts(experts), 8192, "even", device)])
    table(["", "tokens", "forward ms", "forward + backward ms", "TFLOP/s", "over weights and gradients"], rows)


if __name__ == "__main__":
    main()
