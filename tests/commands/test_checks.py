"""What is decided of a config before anything is built: the weight of the multi-token prediction."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from safetensors.torch import save_file

from src.checkpoints.model_card import from_scratch
from src.commands.mtp_weight import mtp_loss_weight
from src.errors import UserError
from src.models.sft_module import SFTModule
from tests.models.tiny import DEEPSEEK_V3

BLOCK = "model.layers.3.enorm.weight"


def base(directory: Path, claimed: int | None, tensors: list[str] | None) -> str:
    """`claimed`: num_nextn_predict_layers; `tensors`: names among the weights, None for a config.json alone."""
    fields = {k: v for k, v in DEEPSEEK_V3.items() if k != "num_nextn_predict_layers"}
    fields |= {} if claimed is None else {"num_nextn_predict_layers": claimed}
    (directory / "config.json").write_text(json.dumps(fields))
    if tensors is not None:
        save_file({name: torch.zeros(1) for name in tensors}, directory / "model.safetensors")
    return str(directory)


def checkpoint(directory: Path, recorded: float | None) -> Path | None:
    """`recorded`: the weight in its config.yaml, None without one; -1: no checkpoint."""
    if recorded == -1:
        return None
    if recorded is not None:
        (directory / "config.yaml").write_text(yaml.safe_dump({"model": {"mtp_loss_weight": recorded}}))
    return directory


@pytest.mark.parametrize(
    ("claimed", "tensors", "from_scratch", "recorded", "has_block"),
    [
        (1, ["lm_head.weight", BLOCK], False, -1, True),
        (1, ["lm_head.weight"], False, -1, False),  # as transformers' save_pretrained writes it
        (1, ["lm_head.weight"], True, -1, True),
        (1, None, False, -1, True),  # a machine that has the config alone
        (0, ["lm_head.weight", BLOCK], False, -1, False),
        (None, ["lm_head.weight"], False, -1, False),
        (1, ["lm_head.weight"], False, 0.3, True),  # resumed: what the checkpoint has
        (1, ["lm_head.weight", BLOCK], False, 0.0, False),
        (1, None, False, None, True),
    ],
)
def test_the_weight_follows_the_block(
    claimed: int | None,
    tensors: list[str] | None,
    from_scratch: bool,
    recorded: float | None,
    has_block: bool,
    tmp_path: Path,
) -> None:
    model = Namespace(pretrained=base(tmp_path, claimed, tensors), from_scratch=from_scratch, mtp_loss_weight=None)
    resumed = checkpoint(tmp_path, recorded)
    assert mtp_loss_weight(model, resumed) == (0.1 if has_block else 0.0)
    model.mtp_loss_weight = 0.0
    assert mtp_loss_weight(model, resumed) == 0.0
    model.mtp_loss_weight = 0.25
    if has_block:
        assert mtp_loss_weight(model, resumed) == 0.25
    else:
        with pytest.raises(ValueError, match=r"mtp_loss_weight is 0\.25, but .* has no multi-token-prediction block"):
            mtp_loss_weight(model, resumed)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", ""),
        (b"model:\n", ""),
        (b"model: {mtp_loss_weight: null}\n", ""),
        (b"seed_everything: 0\n", ""),
        (b"7\n", "holds no settings but '7'"),
        (b"[model]\n", "holds no settings"),
        (b"model: tiny\n", "model is 'tiny', which must be a mapping"),
        (b"model: [1]\n", "model is .*, which must be a mapping"),
        (b"trainer: 3\n", "trainer is '3', which must be a mapping"),
        (b"model: {mtp_loss_weight: much}\n", r"model\.mtp_loss_weight is 'much', which must be a number"),
        (b"model: {mtp_loss_weight: [0.1]}\n", r"model\.mtp_loss_weight is .*, which must be a number"),
        (b"model: {mtp_loss\n", "is not valid YAML"),
        (b"model: \xff\n", "is not valid YAML"),
        (b"[" * 3000, "is not valid YAML"),
    ],
)
def test_a_checkpoints_damaged_settings_are_named(text: bytes, says: str, tmp_path: Path) -> None:
    model = Namespace(pretrained=base(tmp_path, 1, None), from_scratch=False, mtp_loss_weight=None)
    (tmp_path / "config.yaml").write_bytes(text)
    if not says:
        assert mtp_loss_weight(model, tmp_path) == 0.1 and not from_scratch(tmp_path)
        return
    for reads in (lambda: mtp_loss_weight(model, tmp_path), lambda: from_scratch(tmp_path)):
        with pytest.raises(UserError, match=rf"config\.yaml:? {says}.*; copy the checkpoint again$") as error:
            reads()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("claimed", "weight"), [(1, 0.1), (0, 0.0), (None, 0.0)])
def test_a_module_of_its_own_asks_config_json(claimed: int | None, weight: float, tmp_path: Path) -> None:
    directory = base(tmp_path, claimed, None)
    assert SFTModule(directory).mtp_loss_weight == weight
    assert SFTModule(directory, mtp_loss_weight=0.0).mtp_loss_weight == 0.0
    if not claimed:
        with pytest.raises(ValueError, match=r"config\.json has no multi-token-prediction block.*mtp_loss_weight 0"):
            SFTModule(directory, mtp_loss_weight=0.1)
