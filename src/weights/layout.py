"""Compares a Hugging Face directory, by headers only, with the published layout of DeepSeek-V3's weights.

The layout is computed from config.json: names, shapes and dtypes of every tensor, in FP8 (e4m3 with F32 scales), BF16
or F32; the correction bias is F32 always. For DeepSeek-V3's own config.json it gives 91,991 tensors of 688.6 GB in FP8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from src.disk.json_file import read_object
from src.units import counted
from src.weights.fp8 import BLOCK, QUANTIZATION_CONFIG, SCALE_SUFFIX, is_quantised, scale_shape
from src.weights.key_map import hf_shapes, mtp_copies, mtp_layer
from src.weights.safetensors_files import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE, Stored, close, open_weights
from src.weights.side_files import architecture, read_config
from src.weights.source import raise_listed

_LEFTOVERS = (".model*.safetensors.*", ".export.json")  # of an interrupted export


@dataclass(frozen=True)
class Layout:
    """What a directory holds; parameters are elements of weights, without FP8's scales."""

    dtype: str
    tensors: int
    files: int
    nbytes: int
    parameters: int
    mtp_parameters: int
    mtp_copies: int
    remarks: list[str]  # differences from the published layout that transformers and training can read


def check_layout(directory: str | Path, known: Sequence[str] = ()) -> Layout:
    """Compares a directory with the published layout of its config.json's model; reads no weight.

    Args:
        known: problems found before.

    Raises:
        ValueError: there is no config.json or no weights; or one list of everything that is wrong.
    """
    path = Path(directory)
    config = read_config(path)
    descriptors: list[int] = []
    try:
        tensors, problems = open_weights(path, descriptors)
    finally:
        close(descriptors)
    mtp = _has_mtp(config, tensors)
    dtype = _kind(config, tensors)
    problems += [*known, *_wrong_config(config, dtype), *_wrong_files(path, tensors)]
    expected = published_tensors(config, dtype, mtp=mtp)
    problems += _wrong_tensors(expected, tensors)
    raise_listed(f"{path}: {counted(len(problems), 'problem')} with the layout of an export or a download:", problems)

    layers, copies = config["num_hidden_layers"], mtp_copies(config["num_hidden_layers"])
    weights = {name: math.prod(shape) for name, (shape, _) in expected.items() if not name.endswith(SCALE_SUFFIX)}
    block = sum(numel for name, numel in weights.items() if mtp_layer(name, layers))
    copied = sum(numel for name, numel in weights.items() if name in copies)
    return Layout(
        dtype=dtype,
        tensors=len(tensors),
        files=len(list(path.glob("*.safetensors"))),
        nbytes=sum(_nbytes(stored) for stored in tensors.values()),
        parameters=sum(weights.values()) - block,
        mtp_parameters=block - copied,
        mtp_copies=copied,
        remarks=_other_dtypes(expected, tensors) + _other_config(config, mtp, dtype) + _other_total(path, tensors),
    )


def published_tensors(
    config: dict[str, Any], dtype: str, *, mtp: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and dtype of every tensor, scales included.

    Args:
        config: the content of config.json.
        dtype: bf16, fp8 or fp32.
        mtp: with the multi-token-prediction block.
    """
    rows, columns = (config.get("quantization_config") or {}).get("weight_block_size") or (BLOCK, BLOCK)
    plain = torch.float32 if dtype == "fp32" else torch.bfloat16
    tensors = {}
    for name, shape in hf_shapes(architecture(config), mtp=mtp).items():
        if dtype == "fp8" and is_quantised(name):
            tensors[name] = shape, torch.float8_e4m3fn
            tensors[name + SCALE_SUFFIX] = scale_shape(shape, (rows, columns)), torch.float32
        else:
            tensors[name] = shape, torch.float32 if name.endswith("e_score_correction_bias") else plain
    return tensors


def _has_mtp(config: dict[str, Any], tensors: dict[str, Stored]) -> bool:
    return any(mtp_layer(name, config["num_hidden_layers"]) for name in tensors)


def _kind(config: dict[str, Any], tensors: dict[str, Stored]) -> str:
    """What the weights are, by themselves; config.json only decides between BF16 and F32."""
    if any(stored.dtype == torch.float8_e4m3fn for stored in tensors.values()):
        return "fp8"
    return "fp32" if _declared(config) == "float32" else "bf16"


def _declared(config: dict[str, Any]) -> str | None:
    return config.get("torch_dtype", config.get("dtype"))


def _nbytes(stored: Stored) -> int:
    return stored.numel * stored.dtype.itemsize


def _wrong_config(config: dict[str, Any], dtype: str) -> list[str]:
    problems = []
    if config.get("architectures", ["DeepseekV3ForCausalLM"]) != ["DeepseekV3ForCausalLM"]:
        problems.append(f"architectures is {config.get('architectures')}, not ['DeepseekV3ForCausalLM']")
    quantization = config.get("quantization_config")
    if (dtype == "fp8") != (quantization is not None):
        problems.append(
            f"quantization_config is {_there(quantization is not None)}, FP8 weights are {_there(dtype == 'fp8')}"
        )
    for name, value in QUANTIZATION_CONFIG.items():
        if quantization is not None and name != "weight_block_size" and quantization.get(name) != value:
            problems.append(f"quantization_config.{name} is {quantization.get(name)!r}, not {value!r}")
    return [f"config.json: {problem}" for problem in problems]


def _other_config(config: dict[str, Any], mtp: bool, dtype: str) -> list[str]:
    remarks = []
    if dtype != "fp32" and _declared(config) not in (None, "bfloat16"):
        remarks.append(f"torch_dtype is {_declared(config)}, not bfloat16")
    claimed, layer = config.get("num_nextn_predict_layers") or 0, config["num_hidden_layers"]
    if claimed != int(mtp):
        remarks.append(f"num_nextn_predict_layers is {claimed}, but tensors of layer {layer} are {_there(mtp)}")
    return [f"config.json: {remark}" for remark in remarks]


def _other_total(path: Path, tensors: dict[str, Stored]) -> list[str]:
    if not (path / INDEX_FILE).is_file():
        return []
    metadata = read_object(path / INDEX_FILE).get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(_nbytes(stored) for stored in tensors.values())
    # DeepSeek's own index of FP8 weights counts two bytes per element, scales included.
    if claimed in (total, 2 * sum(stored.numel for stored in tensors.values())):
        return []
    return [f"{INDEX_FILE}: total_size is {claimed}, the tensors have {total} bytes"]


def _there(present: bool) -> str:
    return "there" if present else "not there"


def _wrong_files(path: Path, tensors: dict[str, Stored]) -> list[str]:
    """Checks the files other than weights, and the index."""
    problems = []
    named = {SINGLE_FILE}
    if (path / INDEX_FILE).is_file():
        named = set(read_object(path / INDEX_FILE)["weight_map"].values())
    problems += [
        f"{file.name}: belongs to no index, remove it"
        for file in sorted(path.glob("*.safetensors"))
        if file.name not in named
    ]
    problems += [f"{file.name}: left over, remove it" for pattern in _LEFTOVERS for file in sorted(path.glob(pattern))]
    if not any((path / name).is_file() for name in ("tokenizer.json", "tiktoken.model")):
        problems.append("tokenizer.json or tiktoken.model: missing")
    return problems


def _wrong_tensors(expected: dict[str, tuple[tuple[int, ...], torch.dtype]], tensors: dict[str, Stored]) -> list[str]:
    problems = []
    for name, (shape, dtype) in expected.items():
        stored = tensors.get(name)
        if stored is None:
            problems.append(f"missing: {name} {shape}")
            continue
        if stored.shape != shape:
            problems.append(f"shape of {name}: {stored.shape} instead of {shape}")
        if stored.dtype != dtype and torch.float8_e4m3fn in (stored.dtype, dtype):
            problems.append(f"dtype of {name}: {DTYPE_NAMES[stored.dtype]} instead of {DTYPE_NAMES[dtype]}")
    return problems + [f"unexpected: {name} {tensors[name].shape}" for name in tensors if name not in expected]


def _other_dtypes(expected: dict[str, tuple[tuple[int, ...], torch.dtype]], tensors: dict[str, Stored]) -> list[str]:
    """Tensors in BF16, F16 or F32 that are published in another of them: a line for each such pair."""
    others: dict[str, list[str]] = {}
    for name, (_, dtype) in expected.items():
        if (stored := tensors[name].dtype) != dtype:
            others.setdefault(f"{DTYPE_NAMES[stored]} instead of {DTYPE_NAMES[dtype]}", []).append(name)
    return [
        f"{counted(len(names), 'tensor is', 'tensors are')} {pair}, {names[0]} for one"
        for pair, names in others.items()
    ]
