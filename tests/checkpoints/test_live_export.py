"""Exports from running engines, against those of the checkpoints that the same engines saved."""

from pathlib import Path

import pytest

from src.commands.export import export
from src.weights.output import Dtype
from tests.checkpoints.workers import DTYPES, SETTINGS, Checkpoints, live_export


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", SETTINGS)
def test_the_bytes_are_those_of_the_checkpoints_export(
    checkpoints: Checkpoints, label: str, dtype: Dtype, tmp_path: Path
) -> None:
    export(str(checkpoints.folder / label), str(tmp_path / "out"), dtype, max_shard_size="100KB")
    live, expected = contents(live_export(checkpoints.folder, label, dtype)), contents(tmp_path / "out")
    assert live.keys() == expected.keys()
    assert sum(name.endswith(".safetensors") for name in live) > 8
    assert [name for name in live if live[name] != expected[name]] == []
