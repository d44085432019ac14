"""What an export holds in memory at three sizes: `python -m benchmarks.export_memory [--folder DIR]`.

Checkpoints with random masters at DeepSeek-V3's widths, one MoE layer of 2, 8 and 32 experts, are exported by a fresh
process each, whose anonymous memory (RssAnon) is sampled each millisecond. It may take 2 x max_shard_size + 2 GiB.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.common import TRUE_CONFIG, table
from benchmarks.memory import PeakAnonymous
from benchmarks.weights_at_scale import GB, MIB, SMALL, size
from src.weights.output import Dtype
from tests.checkpoints.synthetic import save_checkpoint
from tests.distributed.spawn import run_distributed

EXPERTS = (2, 8, 32)
SHARD = "1GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="needs 15 GB; the system's temporary one by default")
    args = parser.parse_args()
    rows = []
    for experts in EXPERTS:
        config = json.loads((TRUE_CONFIG / "config.json").read_text()) | SMALL | {"n_routed_experts": experts}
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            checkpoint, out = Path(folder) / "ckpt", Path(folder) / "out"
            save_checkpoint(checkpoint, config, experts_per_shard=1, world_size=8)
            masters = size(checkpoint, "*optim_states.pt")
            for dtype in ("bf16", "fp8", "fp32"):
                growth, seconds = run_distributed(measure, 1, checkpoint, out, dtype)[0]
                rows.append([masters / 4e9, dtype, size(out, "*.safetensors") / GB, seconds, f"{growth / MIB:.0f}"])
                shutil.rmtree(out)
    table(("1e9 parameters", "dtype", "GB written", "s", "MiB held"), rows)


def measure(checkpoint: Path, out: Path, dtype: Dtype) -> tuple[int, float]:
    from src.commands.export import export

    began = time.perf_counter()
    with PeakAnonymous() as peak:
        export(str(checkpoint), str(out), dtype, SHARD)
    return peak.growth, time.perf_counter() - began


if __name__ == "__main__":
    main()
