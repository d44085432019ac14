"""Ranges of directories that transformers and the safetensors library wrote, and ways in which one can be broken."""

import errno
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.errors import UserError
from src.weights.fp8 import is_quantised, quantise
from src.weights.hf_reader import HFDirectorySource
from tests.checkpoints.tiny import dequantise_whole, oracle, ranges, save_oracle, stored

SHARD = "model-00002-of-00005.safetensors"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp32")
    save_oracle(path, oracle())
    assert (path / SHARD).is_file()
    return path


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    """The directory again, to be broken."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_ranges_are_those_of_the_safetensors_library(directory: Path) -> None:
    source, expected = HFDirectorySource(directory), stored(directory)
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == torch.float32
        for start, stop in ranges(tensor.shape):
            before = source.bytes_read
            assert torch.equal(source.read(name, start, stop), tensor.view(-1)[start:stop]), name
            assert source.bytes_read - before == 4 * (stop - start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precision_is_the_files_own(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(7, 3).to(dtype), "b": torch.randn(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = HFDirectorySource(tmp_path)
    assert source.dtype("a") == dtype and source.dtype("b") == torch.float32
    assert torch.equal(source.read("a", 2, 20), tensors["a"].view(-1)[2:20])
    assert torch.equal(source.read("b", 0, 5), tensors["b"])


def save_fp8(directory: Path, source: Path) -> dict[str, torch.Tensor]:
    """A directory quantised as the published one, in one file; returns it dequantised."""
    tensors, expected = {}, {}
    for name, tensor in stored(source).items():
        if is_quantised(name):
            tensors[name], tensors[name + "_scale_inv"] = quantise(tensor)
            expected[name] = dequantise_whole(tensors[name], tensors[name + "_scale_inv"])
        else:
            expected[name] = tensors[name] = tensor if name.endswith("bias") else tensor.bfloat16()
    save_file(tensors, directory / "model.safetensors")
    return expected


def test_fp8_is_dequantised_by_range(directory: Path, tmp_path: Path) -> None:
    expected = save_fp8(tmp_path, directory)
    source = HFDirectorySource(tmp_path)
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        assert source.dtype(name) == (torch.float32 if is_quantised(name) else tensor.dtype)
        for start, stop in ranges(tensor.shape):
            assert torch.equal(source.read(name, start, stop), tensor.view(-1)[start:stop]), (name, start, stop)


def test_of_fp8_only_the_range_and_its_scales_are_read(tmp_path: Path) -> None:
    values, scale = quantise(torch.randn(1024, 160))
    save_file({"w": values, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    source = HFDirectorySource(tmp_path)
    source.read("w", 300 * 160 + 5, 301 * 160 + 7)
    assert source.bytes_read == 162 + 4 * 2  # one row of blocks


def test_fp8_is_left_alone_on_demand(directory: Path, tmp_path: Path) -> None:
    save_fp8(tmp_path, directory)
    source, expected = HFDirectorySource(tmp_path, dequantise=False), load_file(tmp_path / "model.safetensors")
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        assert source.dtype(name) == tensor.dtype
        read = source.read(name, 0, tensor.numel())
        assert torch.equal(read.view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_other_block_sizes_are_taken_from_the_config(tmp_path: Path) -> None:
    values = torch.randn(6, 10).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 5)
    save_file({"w": values, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"weight_block_size": [4, 2]}}))
    whole = values.float() * scale.repeat_interleave(4, 0)[:6].repeat_interleave(2, 1)
    assert torch.equal(HFDirectorySource(tmp_path).read("w", 9, 55), whole.view(-1)[9:55])


def truncate(path: Path, size: int) -> None:
    os.truncate(path / SHARD, size)


def edit_index(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda path: (path / SHARD).unlink(), f"{SHARD}: missing"),
        (lambda path: truncate(path, 100_000), f"{SHARD}: truncated, 100000 bytes instead of"),
        (lambda path: truncate(path, 12), f"{SHARD}: truncated, or no safetensors file: 12 bytes"),
        (lambda path: truncate(path, 0), f"{SHARD}: truncated, or no safetensors file: 0 bytes"),
        (
            lambda path: edit_index(path, lambda index: index.update({"lm_head.weight": SHARD})),
            rf"index.json: lm_head.weight is not in {SHARD}",
        ),
        (
            lambda path: edit_index(path, lambda index: index.pop("model.norm.weight")),
            "model.norm.weight is not in model",
        ),
        (lambda path: edit_index(path, lambda index: index.update(x=SHARD)), f"index.json: x is not in {SHARD}"),
    ],
)
def test_broken_directories_are_named(copy: Path, breaks: Callable[[Path], object], message: str) -> None:
    breaks(copy)
    with pytest.raises(ValueError, match=message):
        HFDirectorySource(copy)


def test_a_flipped_bit_in_a_header_is_an_error_that_names_the_file_or_changes_nothing(copy: Path) -> None:
    content, draw = (copy / SHARD).read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    whole = {name: HFDirectorySource(copy).shape(name) for name in HFDirectorySource(copy).names()}
    unnoticed = 0
    for _ in range(600):
        place, bit = draw.randrange(header), draw.randrange(8)
        flipped = bytes([content[place] ^ 1 << bit])
        (copy / SHARD).write_bytes(content[:place] + flipped + content[place + 1 :])
        try:
            source = HFDirectorySource(copy)
        except ValueError as error:
            assert SHARD in str(error), str(error)
        else:
            assert {name: source.shape(name) for name in source.names()} == whole
            unnoticed += 1
    assert unnoticed < 30  # in the metadata


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '"x"', '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{", "\x00"]
)
def test_other_types_in_json_files_are_named(copy: Path, file: str, content: str) -> None:
    (copy / file).write_text(content)
    if file == "config.json" and content.startswith('{"'):
        content = '{"quantization_config": {"weight_block_size": [0, "x"]}}'
        (copy / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(copy / file))):
        HFDirectorySource(copy)


def test_a_file_outside_the_folder_is_not_opened(copy: Path) -> None:
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names files that are not in its folder: '../other.safetensors'"):
        HFDirectorySource(copy)


@pytest.mark.parametrize("place", [SHARD, "model.safetensors.index.json"])
def test_a_pipe_or_a_folder_in_a_files_place_does_not_hang(copy: Path, place: str) -> None:
    for make in (os.mkfifo, os.mkdir):
        (copy / place).unlink(missing_ok=True)
        make(copy / place)
        with pytest.raises(ValueError, match=f"{SHARD}: missing|has neither"):
            HFDirectorySource(copy)
        if make is os.mkfifo:
            (copy / place).unlink()


def failing(real: Callable[..., Any], failure: OSError, fails: Callable[..., bool]) -> Callable[..., Any]:
    """The system's call, which fails where `fails` says so: root may read all, and no disk here is broken."""

    def call(*args: Any) -> Any:
        if fails(*args):
            raise failure
        return real(*args)

    return call


def test_shards_that_cannot_be_read_are_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied, broken = PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(os.open, denied, lambda file, *_: Path(file).name == SHARD))
        with pytest.raises(UserError, match=f"{SHARD}: cannot be read: Permission denied"):
            HFDirectorySource(copy)
    for offset in (0, 8):  # the header's length, the header
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", failing(os.pread, broken, lambda *args, offset=offset: args[2] == offset))
            with pytest.raises(UserError, match=f"{SHARD}: cannot be read: Input/output error"):
                HFDirectorySource(copy)
    source = HFDirectorySource(copy)
    monkeypatch.setattr(os, "preadv", failing(os.preadv, broken, lambda *_: True))
    for name, file in json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"].items():
        with pytest.raises(UserError, match=rf"{copy / file}: {name} cannot be read at byte \d+: Input/output error"):
            source.read(name, 0, 1)


def test_all_problems_are_one_error(copy: Path) -> None:
    (copy / "model-00001-of-00005.safetensors").unlink()
    truncate(copy, 100_000)
    with pytest.raises(ValueError, match=r"(?s)2 problems.*00001-of-00005.safetensors: missing.*00002.*truncated"):
        HFDirectorySource(copy)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither model.safetensors nor model.safetensors.index.json"):
        HFDirectorySource(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, "w is FP8 but w_scale_inv is missing"),
        (
            {"w": torch.zeros(130, 4).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 1)},
            r"w_scale_inv is \(1, 1\) for a weight \(130, 4\)",
        ),
        ({"w": torch.zeros(4, dtype=torch.int32)}, "w is I32, which is none of BF16, F16, F32, F8_E4M3"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        HFDirectorySource(tmp_path)
