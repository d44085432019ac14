"""Exports of trained checkpoints: loaded by transformers, compared with zero_to_fp32, interrupted and shared."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from src.checkpoints import export as module
from src.checkpoints import zero_reader
from src.checkpoints.export_folder import partial_of, start_live
from src.checkpoints.manifest import MANIFEST
from src.commands.export import export
from src.disk.durable import publish
from src.errors import UserError
from src.weights import output
from src.weights.fp8 import QUANTIZATION_CONFIG, is_quantised
from src.weights.hf_reader import HFDirectorySource
from src.weights.key_map import hf_shapes
from src.weights.side_files import architecture
from tests.checkpoints.tiny import CONFIG, LAYERS, SIDE_FILES, dequantise_whole, list_files, save_mtp, stored
from tests.checkpoints.workers import Checkpoints
from tests.disk.full import Disk

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
MTP = f"model.layers.{LAYERS}."


def masters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """DeepSpeed's zero_to_fp32 result with the experts taken apart, independently of the code under test."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, torch.Tensor] = {}
    for name, tensor in get_fp32_state_dict_from_zero_checkpoint(str(checkpoint)).items():
        name = name.removeprefix("model.")
        if ".mlp.experts." not in name:
            weights[name] = tensor
            continue
        prefix, _, rest = name.partition(".experts.")
        shard, kind = rest.split(".")
        for index, expert in enumerate(tensor):
            where = f"{prefix}.experts.{int(shard) * len(tensor) + index}"
            if kind == "down_proj":
                weights[f"{where}.down_proj.weight"] = expert
            else:
                weights[f"{where}.gate_proj.weight"], weights[f"{where}.up_proj.weight"] = expert.chunk(2)
    return weights


def copies(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        f"{MTP}embed_tokens.weight": weights["model.embed_tokens.weight"],
        f"{MTP}shared_head.head.weight": weights["lm_head.weight"],
    }


def written_config(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


def same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_transformers_loads_it_with_the_same_logits(
    checkpoints: Checkpoints, tmp_path: Path, dtype: Any, torch_dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

    checkpoint = checkpoints.folder / "stage 3"
    export(str(checkpoint), str(tmp_path / "out"), dtype, max_shard_size="500KB")
    exported, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch_dtype, output_loading_info=True)
    assert not any(info.values()), info

    weights = masters(checkpoint)
    expected = {name: t if name == BIAS else t.to(torch_dtype) for name, t in weights.items()}
    same(stored(tmp_path / "out"), expected)

    model = DeepseekV3ForCausalLM.from_pretrained(
        None, config=architecture(CONFIG), state_dict=expected, dtype=torch_dtype, attn_implementation="eager"
    )
    exported.set_attn_implementation("eager")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, model(ids).logits)


def test_what_the_directory_holds(checkpoints: Checkpoints, tmp_path: Path) -> None:
    export(str(checkpoints.folder / "stage 3"), str(tmp_path / "out"), max_shard_size="500KB")
    out = tmp_path / "out"
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((out / file).stat().st_size < 500_000 + 20_000 for file in files)
    assert {file.name for file in out.iterdir()} == {
        *files,
        "README.md",
        "config.json",
        "model.safetensors.index.json",
        *SIDE_FILES,
    }
    assert {name: (out / name).read_text() for name in SIDE_FILES} == SIDE_FILES
    assert HFDirectorySource(out).shape(BIAS) == (8,)  # which checks the index against the files

    kept = {key: value for key, value in CONFIG.items() if key != "auto_map"}
    assert written_config(out) == kept | {"num_nextn_predict_layers": 0, "torch_dtype": "bfloat16"}
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("max_shard_size", "out"), [("500KB", "out"), ("5GB", "out"), ("5GB", "new/deep/out")])
def test_a_power_cut_right_after_it_costs_nothing(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_shard_size: str, out: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    disk = Disk(root, 10**9, monkeypatch)
    export(str(checkpoints.folder / "stage 3"), str(root / out), max_shard_size=max_shard_size)
    monkeypatch.undo()
    left = disk.after_power_cut(tmp_path / "left")
    disk.close()
    files = {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
    assert {str(f.relative_to(left)): f.read_bytes() for f in left.rglob("*") if f.is_file()} == files
    assert f"{out}/config.json" in files and len(files) > 5


def test_a_power_cut_after_an_export_by_fit_costs_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    disk, out = Disk(root, 10**9, monkeypatch), root / "new" / "deep" / "out"
    start_live(out)
    publish(partial_of(out), out)
    monkeypatch.undo()
    assert (disk.after_power_cut(tmp_path / "left") / "new" / "deep" / "out").is_dir()
    disk.close()


def test_one_file_has_no_index(checkpoints: Checkpoints, tmp_path: Path) -> None:
    export(str(checkpoints.folder / "stage 1 bf16"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_fp8_is_deepseeks_format(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "CHUNK", 1)  # several bands of rows for each weight
    checkpoint = checkpoints.folder / "stage 3"
    export(str(checkpoint), str(tmp_path / "out"), "fp8", max_shard_size="40KB")  # scales in other files than weights
    loaded, weights = stored(tmp_path / "out"), masters(checkpoint)
    quantised = {name for name in weights if is_quantised(name)}
    assert set(loaded) == set(weights) | {f"{name}_scale_inv" for name in quantised}
    for name, tensor in weights.items():
        if name in quantised:
            assert loaded[name].dtype == torch.float8_e4m3fn
            error = dequantise_whole(loaded[name], loaded[f"{name}_scale_inv"]) - tensor
            assert error.norm() / tensor.norm() < 0.03, name
        else:
            assert torch.equal(loaded[name], tensor if name == BIAS else tensor.bfloat16()), name
    assert written_config(tmp_path / "out")["quantization_config"] == QUANTIZATION_CONFIG
    assert written_config(tmp_path / "out")["torch_dtype"] == "bfloat16"


def test_a_trained_mtp_block_is_written_with_trained_copies(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.folder / "stage 2"
    export(str(checkpoint), str(tmp_path / "out"), "fp32")
    weights = masters(checkpoint)
    same(stored(tmp_path / "out"), weights | copies(weights))
    assert written_config(tmp_path / "out")["num_nextn_predict_layers"] == 1


def test_an_untrained_mtp_block_comes_from_the_base(checkpoints: Checkpoints, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    block = save_mtp(tmp_path / "base", torch.bfloat16)
    export(str(checkpoints.folder / "stage 3"), str(tmp_path / "out"), base=str(tmp_path / "base"))
    weights = {name: t if name == BIAS else t.bfloat16() for name, t in masters(checkpoints.folder / "stage 3").items()}
    same(stored(tmp_path / "out"), block | weights | copies(weights))  # the block to the bit, its copies trained
    assert written_config(tmp_path / "out")["num_nextn_predict_layers"] == 1


def test_the_base_is_by_default_what_training_started_from(
    checkpoints: Checkpoints, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    block = save_mtp(tmp_path / "base", torch.bfloat16)
    shutil.copytree(checkpoints.folder / "stage 3", tmp_path / "ckpt")
    (tmp_path / "ckpt/run.json").write_text(json.dumps({"base": str(tmp_path / "base")}))
    list_files(tmp_path / "ckpt")
    export(str(tmp_path / "ckpt"), str(tmp_path / "out"))
    written = stored(tmp_path / "out")
    own = block.keys() - copies(written)  # the copies are the trained embedding and head
    assert own and all(torch.equal(written[name], block[name]) for name in own)
    assert written_config(tmp_path / "out")["num_nextn_predict_layers"] == 1


def test_an_fp8_block_goes_from_the_base_byte_for_byte(checkpoints: Checkpoints, base: Path, tmp_path: Path) -> None:
    export(str(checkpoints.folder / "stage 2"), str(tmp_path / "base"), "fp8")
    export(str(checkpoints.folder / "stage 3"), str(tmp_path / "out"), "fp8", base=str(tmp_path / "base"))
    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    block = [name for name in before if name.startswith(MTP) and name not in copies(before)]
    assert sum(name.endswith("_scale_inv") for name in block) == 5 + 3 * 9
    for name in block:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


def test_a_base_without_the_block_is_refused(checkpoints: Checkpoints, base: Path, tmp_path: Path) -> None:
    export(str(checkpoints.folder / "stage 3"), str(tmp_path / "base"))
    with pytest.raises(ValueError, match=rf"missing: {MTP}enorm.weight \(160,\) in the base"):
        export(str(checkpoints.folder / "stage 3"), str(tmp_path / "out"), base=str(tmp_path / "base"))


def test_another_models_config_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step=2.ckpt"
    shutil.copytree(checkpoints.folder / "stage 0", checkpoint)
    (checkpoint / "hf" / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 64, "n_routed_experts": 7}))
    list_files(checkpoint)
    with pytest.raises(ValueError) as error:
        export(str(checkpoint), str(tmp_path / "out"))
    assert "unexpected: model.layers.1.mlp.experts.7.up_proj.weight (144, 160)" in str(error.value)
    assert "shape of lm_head.weight: (320, 160) instead of (64, 160)" in str(error.value)
    assert not (tmp_path / "out.partial").exists()
    (checkpoint / "hf" / "config.json").unlink()
    list_files(checkpoint)
    with pytest.raises(ValueError, match=r"hf/config.json is missing; .* training copies it into each checkpoint"):
        export(str(checkpoint), str(tmp_path / "out"))


def test_a_directory_with_files_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(str(checkpoints.folder / "stage 0"), str(out))  # an empty one is taken
    with pytest.raises(ValueError, match=r"out already exists and is not empty: give another directory"):
        export(str(checkpoints.folder / "stage 0"), str(out))


def interrupted(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, files: int = 2) -> None:
    """An export that dies in file number `files` + 1."""
    real, calls = module.write_shard, []

    def dies(*args: Any) -> None:
        calls.append(args)
        if len(calls) > files:
            (out.with_name("out.partial") / f".{args[1].file}.123").write_bytes(b"half")
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_shard", dies)
        export(str(checkpoint), str(out), max_shard_size="500KB")


def test_an_interrupted_export_goes_on(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = checkpoints.folder / "stage 3", tmp_path / "out"
    interrupted(checkpoint, out, monkeypatch)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"out.partial is left over from an interrupted export: continue with"):
        export(str(checkpoint), str(out), max_shard_size="500KB")
    with pytest.raises(ValueError, match=r"out.partial is an export of .*'bf16'.*, not of .*'fp32'"):
        export(str(checkpoint), str(out), "fp32", max_shard_size="500KB", resume=True)

    finished = next((tmp_path / "out.partial").glob("model-00001-of-*.safetensors"))
    before = finished.stat().st_mtime_ns, finished.stat().st_ino
    export(str(checkpoint), str(out), max_shard_size="500KB", resume=True)
    kept = out / finished.name
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == before
    same(stored(out), {name: t if name == BIAS else t.bfloat16() for name, t in masters(checkpoint).items()})
    assert not list(out.glob(".*"))
    export(str(checkpoint), str(out), max_shard_size="500KB", resume=True)  # there is nothing left to do


def test_processes_share_the_files(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under srun, in the least favourable order: the last rank first, more processes than files."""
    checkpoint, out = checkpoints.folder / "stage 3", tmp_path / "out"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    done = []
    for rank in range(7, -1, -1):
        assert not out.exists()
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        export(str(checkpoint), str(out), max_shard_size="500KB")
        done.append(len(list((tmp_path / "out.partial").glob("*.safetensors"))))
    assert done == [0, 0, 0, 0, 1, 2, 3, 0]  # ranks 3 to 0 have a file each; the last one renames the directory
    assert len(list(out.glob("*.safetensors"))) == 4
    same(stored(out), {name: t if name == BIAS else t.bfloat16() for name, t in masters(checkpoint).items()})


def test_a_checkpoint_that_changed_is_not_exported(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process looks at its share of the files: here the second one's has another byte."""
    checkpoint, out = tmp_path / "step=2.ckpt", tmp_path / "out"
    shutil.copytree(checkpoints.folder / "stage 3", checkpoint)
    shards = sorted(file.relative_to(checkpoint) for file in checkpoint.glob("checkpoint/*_optim_states.pt"))
    with open(checkpoint / shards[1], "r+b") as file:
        file.seek(-9000, 2)
        byte = file.read(1)
        file.seek(-9000, 2)
        file.write(bytes([byte[0] ^ 1]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match=rf"\n  {shards[1]}: its content changed"):
        export(str(checkpoint), str(out), max_shard_size="500KB")
    monkeypatch.setenv("RANK", "0")
    export(str(checkpoint), str(out), max_shard_size="500KB")
    assert not out.exists()  # the second one's files are missing


def test_a_batch_script_alone_exports_everything(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "32")
    export(str(checkpoints.folder / "stage 0"), str(tmp_path / "out"), "fp32")
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert set(loaded) == set(hf_shapes(architecture(CONFIG), mtp=False))


def test_nothing_of_a_checkpoint_is_parsed_before_its_manifest_was_checked(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = tmp_path / "step=2.ckpt", tmp_path / "out"
    shutil.copytree(checkpoints.folder / "stage 3", checkpoint)
    (checkpoint / MANIFEST).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(zero_reader, "load_safely", pytest.fail)
        with pytest.raises(UserError, match=r"if you trust it, --accept_unlisted true"):
            export(str(checkpoint), str(out))
    export(str(checkpoint), str(out), accept_unlisted=True)
    assert out.is_dir()
