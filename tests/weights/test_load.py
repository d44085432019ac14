"""Loading in place: whole parameters in this process, ZeRO-3 partitions on two and four."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from src.weights.hf_reader import HFDirectorySource
from src.weights.key_map import mtp_copies
from src.weights.load import load
from src.weights.random_source import RandomSource
from src.weights.side_files import architecture
from tests.checkpoints.tiny import CONFIG, LAYERS, StandIn, our_shapes, stacked, stored
from tests.checkpoints.workers import Setting, load_partitions, refuse_rounded_buffers
from tests.distributed.spawn import run_distributed


@pytest.mark.parametrize(("experts_per_shard", "mtp"), [(1, False), (4, True), (8, False)])
def test_whole_parameters(base: Path, experts_per_shard: int, mtp: bool) -> None:
    model = StandIn(our_shapes(CONFIG, experts_per_shard, mtp=mtp))
    load(model, HFDirectorySource(base), num_hidden_layers=LAYERS)
    expected = stacked(stored(base), experts_per_shard)
    loaded = model.state_dict()
    assert any("e_score_correction_bias" in name for name in loaded)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("world_size", "setting"),
    [(2, Setting(stage=3)), (4, Setting(stage=3, bf16=True, offload=True, mtp=True))],
    ids=["2 processes, fp32", "4 processes, bf16, offload, MTP"],
)
def test_each_rank_reads_its_partitions_alone(base: Path, world_size: int, setting: Setting) -> None:
    ranks: list[dict[str, Any]] = run_distributed(load_partitions, world_size, base, setting)
    assert [rank["wrong"] for rank in ranks] == [[]] * world_size
    needed = sum(torch.Size(shape).numel() * 4 for shape in our_shapes(CONFIG, 2, mtp=setting.mtp).values())
    buffers = ranks[0]["buffers"]  # whole on every rank
    assert sum(rank["bytes"] for rank in ranks) == needed + (world_size - 1) * buffers
    assert max(rank["bytes"] for rank in ranks) < 1.1 * needed / world_size
    if world_size == 4:
        assert sum(rank["padding"] for rank in ranks) > 0  # sizes that do not divide are among them


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp8_on_every_stage(fp8: Path, stage: int) -> None:
    """In bf16, the experts stacked otherwise than elsewhere; stages 0 to 2 keep, and so read, all on every rank."""
    setting = Setting(stage, bf16=True, mtp=stage == 3)
    ranks: list[dict[str, Any]] = run_distributed(load_partitions, 2, fp8, setting, 4)
    assert [rank["wrong"] for rank in ranks] == [[]] * 2
    weights = stored(fp8)
    needed = sum(t.nbytes for name, t in weights.items() if setting.mtp or f"layers.{LAYERS}." not in name)
    if setting.mtp:
        needed -= sum(weights[name].nbytes for name in mtp_copies(LAYERS))
    read = sum(rank["bytes"] for rank in ranks) / (1 if stage == 3 else 2)
    # A range of FP8 comes with the scales of all blocks that it touches, some of which its neighbour reads too.
    assert needed <= read < 1.01 * needed


def test_a_correction_bias_in_bf16_is_refused(base: Path) -> None:
    (message,) = run_distributed(refuse_rounded_buffers, 1, base)
    assert re.search(r"buffer model.layers.1.mlp.gate.e_score_correction_bias is torch.bfloat16, which would", message)


def test_all_mismatches_are_one_error(base: Path) -> None:
    config = CONFIG | {"attention_bias": True, "vocab_size": 64, "n_routed_experts": 4}
    model = StandIn(our_shapes(config, 2))
    with pytest.raises(ValueError) as error:
        load(model, HFDirectorySource(base), num_hidden_layers=LAYERS)
    lines = str(error.value).splitlines()
    assert "  missing: model.layers.0.self_attn.o_proj.bias (160,)" in lines
    assert "  unexpected: model.layers.1.mlp.experts.7.up_proj.weight (144, 160)" in lines
    assert "  shape of lm_head.weight: (320, 160) in the weights, (64, 160) in the model" in lines
    assert not any(f"layers.{LAYERS}." in line for line in lines)  # the MTP block is allowed to be there
    assert lines[0].startswith(f"{len(lines) - 1} tensors do not fit the model")
    assert all(parameter.isnan().all() for parameter in model.parameters())  # nothing was read


def test_a_part_of_the_mtp_block_is_not_enough(base: Path) -> None:
    shapes = our_shapes(CONFIG, 2, mtp=True)
    del shapes[f"model.layers.{LAYERS}.eh_proj.weight"]
    with pytest.raises(ValueError, match=f"unexpected: model.layers.{LAYERS}.eh_proj.weight"):
        load(StandIn(shapes), HFDirectorySource(base), num_hidden_layers=LAYERS)


def test_rotary_tables_in_the_weights_are_ignored() -> None:
    class WithTables(RandomSource):
        def names(self) -> list[str]:
            return [*super().names(), "model.layers.0.self_attn.rotary_emb.inv_freq"]

    model = StandIn(our_shapes(CONFIG, 8))
    load(model, WithTables(architecture(CONFIG), seed=0), num_hidden_layers=LAYERS)
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_the_meta_device_is_refused(base: Path) -> None:
    with torch.device("meta"):
        model = StandIn(our_shapes(CONFIG, 2))
    with pytest.raises(ValueError, match="lm_head.weight is on the meta device: give it memory first"):
        load(model, HFDirectorySource(base), num_hidden_layers=LAYERS)
