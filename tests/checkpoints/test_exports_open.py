"""An export opened as its user opens it: transformers' Auto classes without remote code, config.json key by key.

The bases are as DeepSeek, Moonshot and transformers' save_pretrained write theirs.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config

from src.checkpoints.run_files import write_run_files
from src.commands.export import export
from src.commands.opening import opening
from src.commands.verify import verify
from src.datamodules.tokenizer import load_tokenizer, opening_files
from src.models.deepseek_v3 import config_from_dict
from src.weights import side_files
from src.weights.output import Dtype
from src.weights.side_files import architecture
from tests.checkpoints.synthetic import save_checkpoint
from tests.checkpoints.tiny import SIDE_FILES, list_files
from tests.datamodules.published import TEMPLATE, write_tokenizer
from tests.models.tiny import DEEPSEEK_V3, KIMI_K2, MOONLIGHT

AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
PUBLISHED = {
    "auto_map": AUTO_MAP,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "seq_aux": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "vocab_size": 1280,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DTYPES: tuple[Dtype, ...] = ("bf16", "fp8", "fp32")


def saved_by_transformers() -> dict[str, Any]:
    """With rope_parameters, dtype and what it derives; num_nextn_predict_layers 1, though it never writes the block."""
    config = DeepseekV3Config(
        **{k: v for k, v in DEEPSEEK_V3.items() if k != "num_nextn_predict_layers"}, dtype="bfloat16"
    )
    config.architectures, config.vocab_size = ["DeepseekV3ForCausalLM"], 1280
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    assert "rope_parameters" in fields and "rope_scaling" not in fields and "torch_dtype" not in fields
    assert fields["num_nextn_predict_layers"] == 1
    return fields


BASES: dict[str, dict[str, Any]] = {
    "deepseek": DEEPSEEK_V3 | PUBLISHED | {"quantization_config": FP8},
    "moonlight": MOONLIGHT | PUBLISHED,
    "kimi": KIMI_K2 | PUBLISHED | {"quantization_config": FP8},
    "save_pretrained": saved_by_transformers(),
    "bare": {k: v for k, v in DEEPSEEK_V3.items() if k not in ("architectures", "num_nextn_predict_layers")}
    | {"vocab_size": 1280},
}


def write_base(directory: Path, name: str) -> Path:
    """What `fit` reads of a base beside the weights."""
    directory.mkdir(parents=True)
    if name in ("moonlight", "kimi"):
        write_tokenizer(directory, name)
    else:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (directory / file).write_text(SIDE_FILES[file])
    (directory / "config.json").write_text(json.dumps(BASES[name]))
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    return directory


def write_checkpoint(directory: Path, base: Path) -> None:
    fields = json.loads((base / "config.json").read_text())
    save_checkpoint(directory, fields, 2)
    shutil.rmtree(directory / "hf")
    save_file({"lm_head.weight": torch.zeros(1)}, base / "model.safetensors")  # weights, and no block among them
    files = {f"hf/{name}": text for name, text in opening_files(load_tokenizer(str(base))).items()}
    files["run.json"] = json.dumps({"base": str(base)})
    write_run_files(directory, files, str(base), str(base))
    list_files(directory)


@pytest.mark.parametrize("name", BASES)
def test_config_json_is_the_bases_but_for_what_is_documented(name: str, tmp_path: Path) -> None:
    base = BASES[name]
    write_checkpoint(tmp_path / "ckpt", write_base(tmp_path / "base", name))
    for dtype in DTYPES:
        export(str(tmp_path / "ckpt"), str(tmp_path / dtype), dtype)
        written = json.loads((tmp_path / dtype / "config.json").read_text())
        expected = {key: value for key, value in base.items() if key not in ("auto_map", "quantization_config")}
        spelling = "dtype" if name == "save_pretrained" else "torch_dtype"
        expected |= {spelling: "float32" if dtype == "fp32" else "bfloat16", "num_nextn_predict_layers": 0}
        expected |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
        if dtype == "fp8":
            expected["quantization_config"] = FP8
        assert written == expected
        assert [key for key in written if key in base] == [key for key in base if key in written]


@pytest.mark.parametrize("name", BASES)
def test_the_auto_classes_open_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", name)
    write_checkpoint(tmp_path / "ckpt", base)
    out = tmp_path / "out"
    export(str(tmp_path / "ckpt"), str(out), "fp32")
    assert not list(out.glob("*.py")) and not (out / "tiktoken.model").exists()
    config = AutoConfig.from_pretrained(out, trust_remote_code=False)
    assert type(config) is DeepseekV3Config
    model, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False, output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32
    theirs, ours = AutoTokenizer.from_pretrained(out, trust_remote_code=False), load_tokenizer(str(base))
    text = "Ok, 你好's\n12345" + "".join(token.content for token in ours.added_tokens_decoder.values())
    assert theirs.encode(text) == ours.encode(text, add_special_tokens=False)
    assert theirs.chat_template == ours.chat_template
    export(str(tmp_path / "ckpt"), str(tmp_path / "fp8"), "fp8")
    for folder, layout_only in ((out, True), (out, False), (tmp_path / "fp8", True), (tmp_path / "fp8", False)):
        verify(str(folder), layout_only)
        printed = capsys.readouterr().out
        assert layout_only or printed.count(" ok") == 3
        assert "note: " not in printed
    if name in ("moonlight", "kimi"):
        assert theirs.chat_template == TEMPLATE


def test_the_bases_own_dictionary_stays_as_it_is() -> None:
    for name, fields in BASES.items():
        before = json.dumps(fields)
        architecture(fields)
        config_from_dict(fields)
        assert json.dumps(fields) == before, name


@pytest.mark.parametrize("known", [False, True])
def test_model_type_stays_where_transformers_knows_it(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_files, "transformers_knows", lambda model_type: known)
    side_files.write_config(tmp_path, BASES["kimi"], dtype="bf16", mtp_layers=0)
    written = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert written == ("kimi_k2" if known else "deepseek_v3")


@pytest.mark.parametrize(("model_type", "known"), [("deepseek_v3", True), ("llama", True), ("t5", False), ("x", False)])
def test_what_transformers_knows_is_what_it_opens_as_a_language_model(model_type: str, known: bool) -> None:
    assert side_files.transformers_knows(model_type) is known


@pytest.mark.parametrize("code", [True, False])
@pytest.mark.parametrize("name", ["moonlight", "kimi"])
def test_verify_takes_published_files(
    name: str, code: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their weights, which an export of the same model has, beside their config.json, vocabulary and Python files."""
    base = write_base(tmp_path / "base", name)
    write_checkpoint(tmp_path / "ckpt", base)
    export(str(tmp_path / "ckpt"), str(tmp_path / "out"), "bf16")
    shutil.copy(tmp_path / "out/model.safetensors", base)
    config = {key: value for key, value in BASES[name].items() if key != "quantization_config"}
    (base / "config.json").write_text(json.dumps(config))
    if code:
        for file in ("configuration_deepseek.py", "modeling_deepseek.py"):
            (base / file).write_text('raise RuntimeError("the model\'s code was run")')
    for layout_only in (True, False):
        verify(str(base), layout_only)
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert any("tiktoken.model is opened by the code beside it alone" in note for note in notes)
        assert any("does not open model_type 'kimi_k2'" in note for note in notes) == (name == "kimi")
        assert any("configuration_deepseek.py, modeling_deepseek.py" in note for note in notes) != code


@pytest.mark.parametrize("model_type", ["kimi_k2"])
def test_verify_refuses_what_nothing_opens(model_type: str, tmp_path: Path) -> None:
    """As exports of Kimi were: its model_type, and no code."""
    write_checkpoint(tmp_path / "ckpt", write_base(tmp_path / "base", "kimi"))
    export(str(tmp_path / "ckpt"), str(tmp_path / "out"), "bf16")
    path = tmp_path / "out/config.json"
    path.write_text(path.read_text().replace("deepseek_v3", model_type))
    for layout_only in (True, False):
        with pytest.raises(ValueError, match=f"does not open model_type '{model_type}': set it to 'deepseek_v3'"):
            verify(str(tmp_path / "out"), layout_only)


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no\nsecond line")


def test_verify_refuses_what_the_auto_classes_do_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "ckpt", write_base(tmp_path / "base", "deepseek"))
    export(str(tmp_path / "ckpt"), str(tmp_path / "out"), "bf16")
    for auto, message in (
        (AutoModelForCausalLM, r"transformers does not open config\.json: no$"),
        (AutoTokenizer, "tokenizer: no$"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(auto, "from_config" if auto is AutoModelForCausalLM else "from_pretrained", refuse)
            for layout_only in (True, False):
                with pytest.raises(ValueError, match=message):
                    verify(str(tmp_path / "out"), layout_only)


def test_verify_refuses_a_tokenizer_that_opens_as_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "ckpt", write_base(tmp_path / "base", "deepseek"))
    export(str(tmp_path / "ckpt"), str(tmp_path / "out"), "bf16")
    other = load_tokenizer(str(write_tokenizer(tmp_path / "other", "kimi")))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: other)
    with pytest.raises(ValueError, match=r"AutoTokenizer opens a .*, whose tokens are not those of tokenizer\.json"):
        verify(str(tmp_path / "out"), layout_only=True)


def test_what_auto_map_may_hold_is_read_for_the_code_that_it_names(tmp_path: Path) -> None:
    codes = {"AutoTokenizer": ["own_tokenizer.Slow", None], "AutoConfig": "maker/model--own_config.Config", "Other": 7}
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3 | {"auto_map": codes}))
    _, (remark, *_) = opening(str(tmp_path))
    assert "auto_map names own_config.py, own_tokenizer.py, not here" in remark
