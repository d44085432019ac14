"""What one rank of an SP group computes, timed on one device: its heads over the whole row, its tokens elsewhere.

    python -m benchmarks.sp_rank [--tokens 32768] [--documents 1 8]

The exchanges are replaced by copies of the same shapes, so the figures are the cost of SP but for the wire: a rank's
time times SP, over that of one rank doing all.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.common import BF16, PEAK, arguments, head, median_ms, peak_gib, table, true_config
from benchmarks.layer import build, geometry, our_step, set_kept
from src.models.deepseek_v3.attention import Attention
from src.models.deepseek_v3.flops import FORWARD_AND_BACKWARD, attention_flops, layer_weights
from src.models.deepseek_v3.row import RowGeometry
from src.models.offload import HostStack


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, size: int) -> Tensor:
        ctx.size = size  # type: ignore[attr-defined]
        return x.repeat(size, *[1] * (x.ndim - 1))

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        size = ctx.size  # type: ignore[attr-defined]
        return grad.unflatten(0, (size, -1)).sum(0, dtype=torch.float32).to(grad.dtype), None


class AlikeRanks:
    """An SP group whose ranks all hold the same: every exchange is a copy of the right size."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def all_gather(self, x: Tensor) -> Tensor:
        out: Tensor = _Gather.apply(x, self.size)
        return out

    def all_to_all(self, x: Tensor) -> Tensor:
        return x.clone()

    def all_reduce(self, x: Tensor) -> Tensor:
        return x * self.size


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--documents", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=1, help="rows of --tokens each rank group works on at once")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    config = true_config()
    head(f"One SP rank's part of a layer, row of {options.tokens} tokens, {config.n_routed_experts} experts", device)
    layer, host, rows = build(config, 8, device), HostStack(), []
    set_kept(layer, "keep", host)
    for documents in options.documents:
        lengths = [options.tokens // documents] * documents * options.rows
        whole = geometry(config, lengths, device)
        work = FORWARD_AND_BACKWARD * (
            2 * sum(lengths) * layer_weights(config, False) + attention_flops(config, lengths)
        )
        alone = None
        for size in options.sizes:
            for module in layer.modules():
                if isinstance(module, Attention):
                    module.sp = AlikeRanks(size)  # type: ignore[assignment]
            row = RowGeometry(*whole[:4], whole.documents[:, : sum(lengths) // size], whole.lengths)
            x = torch.randn(sum(lengths) // size, config.hidden_size, device=device, dtype=BF16).requires_grad_()
            step = partial(our_step, layer, x, 0.01 * torch.randn_like(x), row)
            ms = median_ms(step, device)
            alone = alone or ms
            peak = peak_gib(step, device)
            mfu = work / size / ms * 1e3 / PEAK
            cells = [f"{documents} x {options.tokens // documents}", size, f"{ms:.1f}", f"{mfu:.1%}"]
            rows.append([*cells, f"{size * ms / alone - 1:+.1%}", f"{peak:.1f}"])
    table(["documents", "SP", "ms a rank", "MFU", "more work than SP = 1", "peak GiB"], rows)


if __name__ == "__main__":
    main()
