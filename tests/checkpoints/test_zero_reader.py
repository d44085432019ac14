"""Ranges of DeepSpeed's checkpoints against what its live engine gathers and what its zero_to_fp32 assembles."""

import shutil
from pathlib import Path

import pytest
import torch

from src.checkpoints.zero_reader import ZeroCheckpointSource
from src.weights.key_map import PerExpert
from tests.checkpoints.tiny import CONFIG, our_shapes, ranges, stacked, stored
from tests.checkpoints.workers import EXPERTS_PER_SHARD, FROZEN, SETTINGS, Checkpoints


@pytest.mark.parametrize("label", SETTINGS)
def test_all_names_and_shapes_are_there(checkpoints: Checkpoints, label: str) -> None:
    source = ZeroCheckpointSource(checkpoints.folder / label)
    assert source.stage == SETTINGS[label].stage
    shapes = our_shapes(CONFIG, EXPERTS_PER_SHARD, mtp=SETTINGS[label].mtp)
    assert {name: source.shape(name) for name in source.names()} == shapes


@pytest.mark.parametrize("slot", ["fp32", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("label", [label for label, setting in SETTINGS.items() if setting.stage])
def test_masters_and_moments_are_those_of_the_engine(checkpoints: Checkpoints, label: str, slot: str) -> None:
    source = ZeroCheckpointSource(checkpoints.folder / label, slot)  # type: ignore[arg-type]
    expected = checkpoints.gathered[label]
    if slot != "fp32":
        frozen = FROZEN if SETTINGS[label].freeze else ()
        assert set(source.names()) == set(our_shapes(CONFIG, EXPERTS_PER_SHARD, mtp=SETTINGS[label].mtp)) - {
            *frozen,
            "model.layers.1.mlp.gate.e_score_correction_bias",
            *(("model.layers.2.mlp.gate.e_score_correction_bias",) if SETTINGS[label].mtp else ()),
        }
    for name, slots in expected.items():
        assert source.dtype(name) == torch.float32
        for start, stop in ranges(source.shape(name)):
            assert torch.equal(source.read(name, start, stop), slots[slot].view(-1)[start:stop]), (name, start, stop)


@pytest.mark.parametrize("label", [label for label in SETTINGS if label not in ("stage 0", "stage 1", "stage 1 bf16")])
def test_the_whole_is_that_of_zero_to_fp32(checkpoints: Checkpoints, label: str) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    expected = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints.folder / label))
    source = ZeroCheckpointSource(checkpoints.folder / label)
    assert {f"model.{name}" for name in source.names()} == set(expected)
    for name in source.names():
        tensor = expected[f"model.{name}"]
        assert torch.equal(source.read(name, 0, tensor.numel()), tensor.view(-1)), name


@pytest.mark.parametrize("label", ["stage 3", "stage 2", "stage 1"])
def test_frozen_parameters_and_buffers_are_as_loaded(checkpoints: Checkpoints, base: Path, label: str) -> None:
    source, loaded = ZeroCheckpointSource(checkpoints.folder / label), stacked(stored(base), EXPERTS_PER_SHARD)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    for name in (*FROZEN, bias):
        assert torch.equal(source.read(name, 3, 8), loaded[name].view(-1)[3:8]), name
    assert source.dtype(bias) == torch.float32
    assert not torch.equal(source.read("lm_head.weight", 3, 8), loaded["lm_head.weight"].view(-1)[3:8])


def test_stage_0_has_the_models_weights_and_no_named_moments(checkpoints: Checkpoints) -> None:
    source, other = (ZeroCheckpointSource(checkpoints.folder / label) for label in ("stage 0", "stage 3"))
    name = "model.layers.1.mlp.experts.3.gate_up_proj"
    numel = torch.Size(source.shape(name)).numel()
    torch.testing.assert_close(source.read(name, 0, numel), other.read(name, 0, numel))
    with pytest.raises(ValueError, match="stage 0 does not record whose exp_avg is whose"):
        ZeroCheckpointSource(checkpoints.folder / "stage 0", "exp_avg")


def test_experts_under_their_hugging_face_names(checkpoints: Checkpoints) -> None:
    source = ZeroCheckpointSource(checkpoints.folder / "stage 3")
    shard = source.read("model.layers.1.mlp.experts.2.gate_up_proj", 0, 2 * 288 * 160).view(2, 288, 160)
    up = PerExpert(source).read("model.layers.1.mlp.experts.5.up_proj.weight", 0, 144 * 160)
    assert torch.equal(up.view(144, 160), shard[1, 144:])


def test_no_memory_is_copied(checkpoints: Checkpoints) -> None:
    source = ZeroCheckpointSource(checkpoints.folder / "stage 3")
    inside = source.read("lm_head.weight", 0, 100)  # of rank 0's partition alone
    assert inside.untyped_storage().data_ptr() == source.read("lm_head.weight", 50, 60).untyped_storage().data_ptr()


@pytest.fixture
def copy(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    shutil.copytree(checkpoints.folder / "stage 3", tmp_path / "step=2.ckpt")
    return tmp_path / "step=2.ckpt"


def test_missing_and_torn_files_are_one_error(copy: Path) -> None:
    missing = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torn = "zero_pp_rank_0_mp_rank_00_model_states.pt"
    (copy / "checkpoint" / missing).unlink()
    file = copy / "checkpoint" / torn
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"(?s)2 of 4 files are bad.*{missing}: missing.*{torn}: torn"):
        ZeroCheckpointSource(copy)


def test_only_torn_files(copy: Path) -> None:
    for file in (copy / "checkpoint").glob("*_optim_states.pt"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="torn files.*\n.*zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        ZeroCheckpointSource(copy)


def test_other_directories_are_refused(copy: Path) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint: it has no file `latest`"):
        ZeroCheckpointSource(copy / "checkpoint")


def test_objects_that_could_run_code_are_refused(copy: Path) -> None:
    file = copy / "checkpoint" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save(torch.load(file, weights_only=False) | {"client": ZeroCheckpointSource}, file)
    with pytest.raises(ValueError, match="holds an object that is not loaded for safety"):
        ZeroCheckpointSource(copy)
