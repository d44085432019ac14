"""What loading and exporting hold in memory does not grow with the model: chunks, and the partition that is kept.

Chunks are made smaller than the tests' models, so that a model eight times as large has eight times as many of them.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import PeakAnonymous
from src.weights.layout import check_layout
from src.weights.output import Dtype
from tests.checkpoints.synthetic import save_checkpoint
from tests.checkpoints.tiny import CONFIG, LAYERS, StandIn, our_shapes
from tests.checkpoints.workers import Setting
from tests.distributed.spawn import run_distributed

MIB = 2**20
CHUNK = 1 << 16
WIDTHS = (256, 512, 1024)  # 2.3e6, 7.4e6 and 27e6 parameters, whose fp32 masters take 9, 28 and 101 MiB


def config(width: int) -> dict[str, Any]:
    return CONFIG | {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width // 2,
        "num_nextn_predict_layers": 0,
        "vocab_size": 2 * width,
    }


def smaller_chunks() -> None:
    from src.weights import load, output, source

    output.CHUNK = CHUNK
    for module in (load, output):
        module.chunks = lambda start, stop, step=CHUNK: source.chunks(start, stop, step)  # type: ignore[attr-defined]


def export_growth(checkpoint: Path, out: Path, dtype: Dtype) -> int:
    from src.commands.export import export

    smaller_chunks()
    with PeakAnonymous() as peak:
        export(str(checkpoint), str(out), dtype, max_shard_size="20MB")
    return peak.growth


def load_growth(directory: Path, width: int) -> tuple[int, int]:
    """What loading takes beyond the partitions, which are there before, and the bytes it reads."""
    import deepspeed

    from src.weights.hf_reader import HFDirectorySource
    from src.weights.load import load

    smaller_chunks()
    deepspeed.init_distributed("gloo")
    with deepspeed.zero.Init(config_dict_or_path=Setting(stage=3).deepspeed_config()):
        model = StandIn(our_shapes(config(width), 2))
    source = HFDirectorySource(directory)
    with PeakAnonymous() as peak:
        load(model, source, num_hidden_layers=LAYERS, progress=False)
    return peak.growth, source.bytes_read


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, int]]:
    """Width -> an export of a checkpoint of that width, and what it took."""
    folder = tmp_path_factory.mktemp("sizes")
    found = {}
    for width in WIDTHS:
        save_checkpoint(folder / f"ckpt {width}", config(width), experts_per_shard=2)
        out = folder / str(width)
        found[width] = out, run_distributed(export_growth, 1, folder / f"ckpt {width}", out, request.param)[0]
        shutil.rmtree(folder / f"ckpt {width}")
    return found


def test_what_an_export_holds_does_not_grow_with_the_model(exports: dict[int, tuple[Path, int]]) -> None:
    growths = [growth for _, growth in exports.values()]
    assert growths[-1] < growths[0] + 16 * MIB


def test_what_a_load_holds_beyond_its_partition_does_not_grow_and_nothing_is_read_twice(
    exports: dict[int, tuple[Path, int]],
) -> None:
    growths = []
    for width in (WIDTHS[0], WIDTHS[-1]):
        directory, _ = exports[width]
        ranks = run_distributed(load_growth, 2, directory, width)
        growths.append(max(growth for growth, _ in ranks))
        stored = check_layout(directory).nbytes
        # A chunk of FP8 comes with the scales of all blocks that it touches, as its neighbour does.
        assert stored <= sum(nbytes for _, nbytes in ranks) < 1.03 * stored
    assert growths[-1] < growths[0] + 16 * MIB
