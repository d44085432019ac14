"""The experts' five products, at DeepSeek-V3's widths: one grouped product a shard, or one product an expert.

    python -m benchmarks.grouped [--rows 32768] [--experts 32]

A shard's rows are spread over its experts at random. `loop N` calls torch.mm for each expert, on N streams.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import BF16, arguments, head, median_ms, relative, table

H, I = 7168, 2048  # noqa: E741 (the field's letter)


def loop(pairs: list[tuple[Tensor, Tensor, Tensor]], streams: list[torch.cuda.Stream]) -> None:
    """out = a b for each (a, b, out), spread over the streams."""
    current = torch.cuda.current_stream()
    for stream in streams:
        stream.wait_stream(current)
    for number, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            for a, b, out in pairs[number :: len(streams)]:
                torch.mm(a, b, out=out)
    for stream in streams:
        current.wait_stream(stream)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[32768, 8192])
    parser.add_argument("--experts", type=int, default=32)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    head(f"Grouped products, {options.experts} experts a shard, bf16", device)
    gate_up = (0.02 * torch.randn(options.experts, 2 * I, H, device=device)).to(BF16)
    down = (0.02 * torch.randn(options.experts, H, I, device=device)).to(BF16)
    table_rows = []
    for total in options.rows:
        sizes = torch.bincount(torch.randint(options.experts, (total,)), minlength=options.experts).tolist()
        offsets = torch.tensor(sizes, device=device).cumsum(0).int()
        x, y = torch.randn(total, H, device=device).to(BF16), torch.randn(total, H, device=device).to(BF16)
        h, a = torch.randn(total, 2 * I, device=device).to(BF16), torch.randn(total, I, device=device).to(BF16)
        forms: dict[str, tuple[Tensor, Tensor]] = {
            "x gate_up^T": (x, gate_up.mT),
            "a down^T": (a, down.mT),
            "dy down": (y, down),
            "dh gate_up": (h, gate_up),
            "dh^T x": (h.mT, x),
            "dy^T a": (y.mT, a),
        }
        for name, (left, right) in forms.items():
            expected = F.grouped_mm(left, right, offs=offsets)
            out = torch.empty_like(expected)
            if right.ndim == 3:
                pairs = list(zip(left.split(sizes), right, out.split(sizes), strict=True))
                work = 2 * total * left.shape[1] * right.shape[2]
            else:
                pairs = list(zip(left.split(sizes, 1), right.split(sizes), out, strict=True))
                work = 2 * total * left.shape[0] * right.shape[1]
            runs: dict[str, Callable[[], object]] = {
                "grouped_mm": lambda a=left, b=right, o=offsets: F.grouped_mm(a, b, offs=o),
            }
            for count in (1, 2, 4):
                streams = [torch.cuda.Stream() for _ in range(count)]
                runs[f"loop {count}"] = lambda p=pairs, s=streams: loop(p, s)
            rates = []
            for run in runs.values():
                rates.append(f"{work / median_ms(run, device, 9, 2) / 1e9:.0f}")
            torch.cuda.synchronize()
            assert relative(out, expected) < 1e-2, name
            table_rows.append([total, name, *rates])
    table(
        ["rows", "product", *[f"{name} TFLOP/s" for name in ("grouped_mm", "loop 1", "loop 2", "loop 4")]], table_rows
    )


if __name__ == "__main__":
    main()
