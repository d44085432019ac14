"""Projection to the vocabulary and cross-entropy, forward and both gradients, at DeepSeek-V3's widths.

python -m benchmarks.loss [--tokens 8192 16384]
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import BF16, arguments, head, median_ms, peak_gib, relative, table
from src.models.loss import _add_section, linear_cross_entropy

H, V = 7168, 129280
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(x, w, labels, [(len(labels), 1 / len(labels))])[0]


def bf16_logits(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), labels)


def fp32_logits(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).float(), labels)


def liger(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    result: Tensor = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(w, x, labels)
    return result


def exact_weight_gradient(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """fp32 throughout, in chunks of tokens."""
    total, w = torch.zeros_like(w, dtype=torch.float32), w.detach().float()
    for part, own in zip(x.detach().split(1024), labels.split(1024), strict=True):
        logits = part.float() @ w.T
        grad = logits.softmax(-1).scatter_add_(
            -1, own[:, None], torch.full_like(own[:, None], -1.0, dtype=torch.float32)
        )
        total += grad.T @ part.float() / len(labels)
    return total


def error_before_rounding(x: Tensor, w: Tensor, labels: Tensor, exact: Tensor) -> float:
    """Of our weight's gradient while it is still in fp32; autograd hands it on in the weight's own bf16."""
    with torch.no_grad():
        total = torch.zeros_like(w, dtype=torch.float32)
        losses, correct = torch.empty(len(x), device=x.device), torch.empty(len(x), device=x.device, dtype=torch.bool)
        _add_section(x, w, labels, 1 / len(x), losses, correct, None, total)
        return relative(total, exact)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 16384])
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    head(f"Linear cross-entropy, hidden {H}, vocabulary {V}, bf16", device)
    w = (0.02 * torch.randn(V, H, device=device)).to(BF16).requires_grad_()
    rows = []
    for tokens in options.tokens:
        x = torch.randn(tokens, H, device=device).to(BF16).requires_grad_()
        labels = torch.randint(V, (tokens,), device=device)
        exact = exact_weight_gradient(x, w, labels)
        methods: dict[str, Loss] = {"ours": ours, "bf16 logits": bf16_logits, "fp32 logits": fp32_logits}
        if importlib.util.find_spec("liger_kernel"):
            methods["Liger, fp32 sums"] = liger
        for name, method in methods.items():

            def step(method: Loss = method, x: Tensor = x, labels: Tensor = labels) -> None:
                x.grad = w.grad = None
                method(x, w, labels).backward()

            step()
            assert w.grad is not None
            error = relative(w.grad, exact)
            peak = peak_gib(step, device)
            fp32 = f"{error_before_rounding(x, w, labels, exact):.1e}" if name == "ours" else ""
            rows.append([name, tokens, f"{median_ms(step, device):.1f}", f"{peak:.2f}", f"{error:.1e}", fp32])
            w.grad = x.grad = None
            torch.cuda.empty_cache()
        del exact
    table(["method", "tokens", "ms", "peak GiB over inputs", "error of dW in bf16", "in fp32"], rows)
    print(f"One fp32 gradient of the weight is {4 * V * H / 2**30:.2f} GiB, one in bf16 {2 * V * H / 2**30:.2f} GiB.")


if __name__ == "__main__":
    main()
