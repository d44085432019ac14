"""`verify --layout-only` on exports, on the published layout at its true size, and on what is broken.

The oracles are written without the code under test: transformers' own model, and DeepSeek-R1's tensors spelled out for
a dense layer, an MoE layer and the multi-token prediction's.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.commands.export import export
from src.commands.verify import verify
from src.weights.hf_writer import OutputTensor, index, plan_shards, write_json
from src.weights.layout import check_layout, published_tensors
from src.weights.output import Dtype
from src.weights.side_files import architecture
from tests.checkpoints.tiny import CONFIG, SIDE_FILES
from tests.checkpoints.workers import DTYPES, Checkpoints

ROOT = Path(__file__).parents[2]
DEEPSEEK: dict[str, Any] = json.loads((ROOT / "configs/models/deepseek-v3/config.json").read_text())
FP8 = DEEPSEEK | {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
}
# As deepseek-ai/DeepSeek-R1 has them: shape, and the shape of the scales where the weight is in FP8.
ATTENTION = {
    "self_attn.q_a_proj.weight": ((1536, 7168), (12, 56)),
    "self_attn.q_a_layernorm.weight": ((1536,), None),
    "self_attn.q_b_proj.weight": ((24576, 1536), (192, 12)),
    "self_attn.kv_a_proj_with_mqa.weight": ((576, 7168), (5, 56)),
    "self_attn.kv_a_layernorm.weight": ((512,), None),
    "self_attn.kv_b_proj.weight": ((32768, 512), (256, 4)),
    "self_attn.o_proj.weight": ((7168, 16384), (56, 128)),
    "input_layernorm.weight": ((7168,), None),
    "post_attention_layernorm.weight": ((7168,), None),
}
DENSE = ATTENTION | {
    "mlp.gate_proj.weight": ((18432, 7168), (144, 56)),
    "mlp.up_proj.weight": ((18432, 7168), (144, 56)),
    "mlp.down_proj.weight": ((7168, 18432), (56, 144)),
}
MOE = (
    ATTENTION
    | {"mlp.gate.weight": ((256, 7168), None), "mlp.gate.e_score_correction_bias": ((256,), None)}
    | {
        f"mlp.{expert}.{kind}_proj.weight": shapes
        for expert in ("shared_experts", *(f"experts.{number}" for number in range(256)))
        for kind, shapes in {
            "gate": ((2048, 7168), (16, 56)),
            "up": ((2048, 7168), (16, 56)),
            "down": ((7168, 2048), (56, 16)),
        }.items()
    }
)
MTP = MOE | {
    "embed_tokens.weight": ((129280, 7168), None),
    "enorm.weight": ((7168,), None),
    "hnorm.weight": ((7168,), None),
    "eh_proj.weight": ((7168, 14336), None),
    "shared_head.norm.weight": ((7168,), None),
    "shared_head.head.weight": ((129280, 7168), None),
}


def spelled_out(layer: int, tensors: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    found = {}
    for name, (shape, scales) in tensors.items():
        exact = torch.float32 if name.endswith("bias") else torch.bfloat16
        found[f"model.layers.{layer}.{name}"] = shape, torch.float8_e4m3fn if scales else exact
        if scales:
            found[f"model.layers.{layer}.{name}_scale_inv"] = scales, torch.float32
    return found


@pytest.mark.parametrize(("layer", "tensors"), [(2, DENSE), (3, MOE), (61, MTP)], ids=["dense", "MoE", "MTP"])
def test_the_layers_are_those_of_deepseek_r1(layer: int, tensors: dict[str, Any]) -> None:
    layout = published_tensors(FP8, "fp8", mtp=True)
    prefix = f"model.layers.{layer}."
    assert {name: value for name, value in layout.items() if name.startswith(prefix)} == spelled_out(layer, tensors)


def test_the_whole_is_that_of_deepseek_r1() -> None:
    """91,991 tensors in 163 files of 688,586,727,753 bytes, of which headers are about 130 a tensor; its index counts
    two bytes for each element."""
    layout = published_tensors(FP8, "fp8", mtp=True)
    assert 2 * sum(torch.Size(shape).numel() for shape, _ in layout.values()) == 1_369_062_772_000
    nbytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())
    assert len(layout) == 91_991
    assert 100 < (688_586_727_753 - nbytes) / len(layout) < 160


def transformers_layout(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' own model, which stacks experts in memory, without memory for them."""
    from transformers import DeepseekV3ForCausalLM

    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(architecture(config))
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        base, stacked, kind = name.partition(".mlp.experts.")
        if not stacked:
            found[name] = tuple(tensor.shape)
            continue
        count, rows, columns = tensor.shape
        parts = {"gate_proj": rows // 2, "up_proj": rows // 2} if kind == "gate_up_proj" else {"down_proj": rows}
        for expert in range(count):
            found |= {f"{base}.mlp.experts.{expert}.{part}.weight": (n, columns) for part, n in parts.items()}
    return found


@pytest.mark.parametrize("config", [DEEPSEEK, CONFIG, CONFIG | {"q_lora_rank": None, "attention_bias": True}])
def test_names_and_shapes_are_those_of_transformers(config: dict[str, Any]) -> None:
    layout = published_tensors(config, "bf16", mtp=False)
    assert {name: shape for name, (shape, _) in layout.items()} == transformers_layout(config)


def write_sparse(directory: Path, config: dict[str, Any], dtype: str, max_shard_size: int) -> int:
    """A directory of files with right headers, as long as the real ones, that take no disk; bytes of the tensors."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    for name, text in SIDE_FILES.items():
        (directory / name).write_text(text)

    def never() -> Any:
        raise AssertionError("headers alone are written")

    tensors = [
        OutputTensor(name, shape, kind, never)
        for name, (shape, kind) in published_tensors(config, dtype, mtp=True).items()
    ]
    shards = plan_shards(tensors, max_shard_size)
    write_json(directory / "model.safetensors.index.json", index(shards))
    for shard in shards:
        with open(directory / shard.file, "wb") as file:
            header, _ = shard.layout()
            file.write(header)
            file.truncate(len(header) + shard.nbytes)
    return sum(shard.nbytes for shard in shards)


@pytest.mark.parametrize(
    ("dtype", "config", "size"), [("fp8", FP8, "688,574,839,360"), ("bf16", DEEPSEEK, "1,368,979,721,216")]
)
def test_671b_takes_seconds(
    dtype: str, config: dict[str, Any], size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sparse(tmp_path / "model", config, dtype, 5 * 10**9)
    started = time.process_time()
    verify(str(tmp_path / "model"), layout_only=True)
    assert time.process_time() - started < 15
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert printed["bytes"] == size
    assert printed["parameters of the main model"] == "671,026,419,200"
    assert printed["parameters of the multi-token prediction"] == "11,610,068,224"
    assert printed["its copies of embedding and head"] == "1,853,358,080"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", ["stage 3", "stage 2"], ids=["without MTP", "with MTP"])
def test_exports_have_it(checkpoints: Checkpoints, label: str, dtype: Dtype, tmp_path: Path) -> None:
    export(str(checkpoints.folder / label), str(tmp_path / "out"), dtype, max_shard_size="300KB")
    layout = check_layout(tmp_path / "out")
    assert layout.dtype == dtype
    assert (layout.mtp_parameters > 0) == (label == "stage 2")
    stored = [t for file in (tmp_path / "out").glob("*.safetensors") for t in load_file(file).items()]
    assert layout.tensors == len(stored) and layout.nbytes == sum(tensor.nbytes for _, tensor in stored)
    counted = layout.parameters + layout.mtp_parameters + layout.mtp_copies
    assert counted == sum(tensor.numel() for name, tensor in stored if not name.endswith("_scale_inv"))


@pytest.fixture(scope="module")
def exported(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layout") / "fp8"
    export(str(checkpoints.folder / "stage 2"), str(out), "fp8", max_shard_size="300KB")
    return out


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def replace_tensor(out: Path, name: str, tensor: torch.Tensor) -> None:
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(out / weight_map[name])
    save_file(tensors | {name: tensor}, out / weight_map[name])


def config_without(name: str) -> Callable[[Path], None]:
    return lambda out: edit(out / "config.json", lambda config: config.pop(name))


def config_with(**fields: Any) -> Callable[[Path], None]:
    return lambda out: edit(out / "config.json", lambda config: config.update(fields))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (config_without("quantization_config"), "quantization_config is not there, FP8 weights are there"),
        (
            config_with(quantization_config={"weight_block_size": [128, 128]}),
            "quantization_config.fmt is None, not 'e4m3'",
        ),
        (config_with(architectures=["X"]), r"architectures is \['X'\], not \['DeepseekV3ForCausalLM'\]"),
        (config_with(vocab_size=64), r"shape of lm_head.weight: \(320, 160\) instead of \(64, 160\)"),
        (config_with(n_routed_experts=12), r"missing: model.layers.1.mlp.experts.11.gate_proj.weight \(144, 160\)"),
        (
            config_with(n_routed_experts=4, n_group=1, topk_group=1),
            r"unexpected: model.layers.1.mlp.experts.7.up_proj.weight \(144, 160\)",
        ),
        (
            lambda out: replace_tensor(out, "model.layers.0.mlp.up_proj.weight_scale_inv", torch.zeros(3, 3)),
            r"shape of model.layers.0.mlp.up_proj.weight_scale_inv: \(3, 3\) instead of \(3, 2\)",
        ),
        (
            lambda out: edit(out / "model.safetensors.index.json", lambda i: i["weight_map"].pop("lm_head.weight")),
            "lm_head.weight is not in model.safetensors.index.json",
        ),
        (
            lambda out: shutil.copy(next(out.glob("model-00001*")), out / "model-9.safetensors"),
            "model-9.*belongs to no",
        ),
        (lambda out: (out / ".export.json").touch(), ".export.json: left over"),
        (
            lambda out: replace_tensor(out, "model.layers.0.mlp.up_proj.weight", torch.zeros(272, 160).bfloat16()),
            "dtype of model.layers.0.mlp.up_proj.weight: BF16 instead of F8_E4M3",
        ),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json or tiktoken.model: missing"),
        (lambda out: (out / "tokenizer.json").write_text("{"), "tokenizer: "),
        (lambda out: (out / "chat_template.jinja").unlink(), "has no chat template"),
    ],
)
def test_what_is_wrong_is_named(exported: Path, breaks: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "out")
    breaks(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        verify(str(tmp_path / "out"), layout_only=True)


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        (config_with(num_nextn_predict_layers=0), "num_nextn_predict_layers is 0, but tensors of layer 2 are there"),
        (config_without("architectures"), ""),
        (config_with(torch_dtype="float16"), "torch_dtype is float16, not bfloat16"),
        (
            lambda out: replace_tensor(out, BIAS, torch.ones(8).half()),
            f"1 tensor is F16 instead of F32, {BIAS} for one",
        ),
        (
            lambda out: edit(out / "model.safetensors.index.json", lambda i: i["metadata"].update(total_size=5)),
            "index.json: total_size is 5, the tensors have",
        ),
        (lambda out: (out / "generation_config.json").unlink(), "generation_config.json is not here"),
        (config_with(auto_map={"AutoConfig": "configuration_x.C"}), "auto_map names configuration_x.py, not here"),
    ],
)
def test_what_training_and_transformers_read_is_remarked(
    exported: Path, changes: Callable[[Path], object], remark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported, tmp_path / "out")
    verify(str(tmp_path / "out"), layout_only=True)
    assert "note: " not in capsys.readouterr().out
    changes(tmp_path / "out")
    verify(str(tmp_path / "out"), layout_only=True)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert any(remark in note for note in notes) if remark else not notes


def test_everything_wrong_is_one_error(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out/tokenizer.json").unlink()
    config_with(vocab_size=64, architectures=[])(tmp_path / "out")
    next((tmp_path / "out").glob("model-00002*")).write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"(?s)problems with the layout.*00002-of.*architectures.*tokenizer.*missing: "
    ):
        verify(str(tmp_path / "out"), layout_only=True)


def test_deepseeks_own_total_size_is_taken(exported: Path, tmp_path: Path) -> None:
    """Two bytes for each element of FP8 weights and scales: what its BF16 weights would have."""
    shutil.copytree(exported, tmp_path / "out")
    elements = sum(t.numel() for file in exported.glob("*.safetensors") for t in load_file(file).values())
    edit(tmp_path / "out/model.safetensors.index.json", lambda i: i["metadata"].update(total_size=2 * elements))
    check_layout(tmp_path / "out")
