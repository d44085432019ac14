"""The routed experts of one layer at DeepSeek-V3's widths: dispatch, products, SwiGLU, combine, forward and backward.

    python -m benchmarks.experts [--tokens 8192 16384 32768]

gate_up is computed again in the backward pass and counted once: useful operations are 18 T K H I.
"""

import statistics

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


def run(experts: Experts | LoopOverExperts, x: Tensor, chosen: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    for parameter in experts.parameters():
        parameter.grad = None
    x.grad = weights.grad = None
    out = experts(x, weights, experts.route(chosen))
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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 16384, 32768])
    parser.add_argument("--shards", type=int, nargs="*", default=[8])
    parser.add_argument("--guide", action="store_true", help="the loop over experts too, at 8192 tokens: seconds a run")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    head(f"Routed experts: {E} of {I}, hidden {H}, top {K}, bf16", device)
    rows = []
    for shards in options.shards:
        experts = build(shards, device)

        def inputs(kind: str, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            chosen, weights = routing(kind, tokens, device)
            x = torch.randn(tokens, H, device=device, dtype=BF16).requires_grad_()
            return x, chosen, weights.requires_grad_(), torch.randn(tokens, H, device=device, dtype=BF16)

        for kind in ("even", "skewed", "half"):
            given = inputs(kind, 611)
            first, gradients = run(experts, *given), [p.grad for p in experts.parameters()]
            second = run(experts, *given)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"
            for one, parameter in zip(gradients, experts.parameters(), strict=True):
                assert one is not None and parameter.grad is not None and torch.equal(one, parameter.grad)
            worst = max(relative(a, b) for a, b in zip(first, reference(experts, *given), strict=True))
            assert worst < 1e-2, f"{kind}: off by {worst}"
            rows.append(
                [f"{shards} shards", f"611 {kind}", "", "", "", f"error {worst:.1e}, two runs equal to the bit"]
            )
        del gradients, first, second
        for tokens in options.tokens:
            for kind in ("even", "skewed", "half") if tokens == 16384 else ("even",):
                given = inputs(kind, tokens)
                useful = 18 * tokens * K * H * I
                with torch.no_grad():
                    forward = median_ms(lambda g=given: experts(g[0], g[2], experts.route(g[1])), device)
                both = median_ms(lambda g=given: run(experts, *g), device)
                for parameter in experts.parameters():
                    parameter.grad = None
                peak = peak_gib(lambda g=given: run(experts, *g), device)
                rate = f"{useful / both / 1e9:.0f}"
                rows.append(
                    [
                        f"{shards} shards",
                        f"{tokens} {kind}",
                        f"{forward:.1f}",
                        f"{both:.1f}",
                        rate,
                        f"peak {peak:.1f} GiB",
                    ]
                )
                if shards == options.shards[0]:
                    fast = pointwise._fast
                    pointwise._fast = lambda x: False
                    plain = median_ms(lambda g=given: run(experts, *g), device, 3)
                    pointwise._fast = fast
                    rows.append(
                        [
                            "plain PyTorch between the products",
                            f"{tokens} {kind}",
                            "",
                            f"{plain:.1f}",
                            f"{useful / plain / 1e9:.0f}",
                            "",
                        ]
                    )
        if options.guide and shards == options.shards[0]:
            loop, given = LoopOverExperts(experts), inputs("even", 8192)
            slow = statistics.median([median_ms(lambda: run(loop, *given), device, 1, 1) for _ in range(2)])
            rows.append(
                ["the guide's loop", "8192 even", "", f"{slow:.0f}", f"{18 * 8192 * K * H * I / slow / 1e9:.0f}", ""]
            )
        del experts
    table(["", "tokens", "forward ms", "forward + backward ms", "TFLOP/s", ""], rows)


if __name__ == "__main__":
    main()
