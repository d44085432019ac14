"""The plan of the files, and files that the safetensors library reads back."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.weights.hf_writer import OutputTensor, index, is_complete, plan_shards, write_shard


def output(name: str, tensor: torch.Tensor, step: int = 7) -> OutputTensor:
    return OutputTensor(name, tuple(tensor.shape), tensor.dtype, lambda: iter(tensor.reshape(-1).split(step)))


def mixed() -> dict[str, torch.Tensor]:
    """Tensors whose sizes in the given order would put the wide ones at odd bytes."""
    torch.manual_seed(0)
    return {
        "fp8": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "scale": torch.rand(1, 1),
        "bf16": torch.randn(3).bfloat16(),
        "fp32": torch.randn(4, 3),
        "empty": torch.empty(0, 4),
    }


def test_files_are_read_back(tmp_path: Path) -> None:
    tensors = mixed()
    (shard,) = plan_shards([output(name, tensor) for name, tensor in tensors.items()], 10**6)
    assert shard.file == "model.safetensors"
    written: list[int] = []
    write_shard(tmp_path, shard, written.append)
    assert sum(written) == shard.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].shape == tensor.shape and loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))


def test_the_plan_fills_files_in_order() -> None:
    tensors = [output(name, torch.zeros(size, dtype=torch.uint8).view(torch.float8_e4m3fn)) for name, size in SIZES]
    shards = plan_shards(tensors, 100)
    assert [[tensor.name for tensor in shard.tensors] for shard in shards] == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert [shard.file for shard in shards] == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    content = index(shards)
    assert content["metadata"]["total_size"] == sum(size for _, size in SIZES)
    assert content["weight_map"]["d"] == "model-00003-of-00004.safetensors"
    assert list(content["weight_map"]) == [name for name, _ in SIZES]
    json.dumps(content)


SIZES = [("a", 60), ("b", 40), ("c", 1), ("d", 250), ("e", 50), ("f", 50)]


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    def fails() -> Iterator[torch.Tensor]:
        yield torch.zeros(5)
        raise OSError("disk")

    (good,) = plan_shards([output("w", torch.ones(10))], 100)
    (bad,) = plan_shards([OutputTensor("w", (10,), torch.float32, fails)], 100)
    assert not is_complete(tmp_path, good)
    with pytest.raises(OSError, match="disk"):
        write_shard(tmp_path, bad)
    assert not is_complete(tmp_path, bad)
    write_shard(tmp_path, good)
    assert is_complete(tmp_path, good)
    file = tmp_path / good.file
    file.write_bytes(file.read_bytes()[:-1])
    assert not is_complete(tmp_path, good)
