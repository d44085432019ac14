"""Named validation sets and files mixed by weight, through fit and validate on DP x SP, against transformers."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from src.datamodules.packed_set import PackedSet
from src.datamodules.packing import one_sample_a_row
from src.models.sft_module import SFTModule
from src.strategies import DeepSpeedSPStrategy
from tests.models.tiny import DEEPSEEK_V3, oracle

from .spawn import run_distributed
from .training import MemoryCache, MemoryData, documents, means, save_model

SETS = {None: 3, "math": 5, "chat.v2": 1}  # documents of each set; the last has fewer than there are ranks


class ManySets(MemoryData):
    def __init__(self) -> None:
        super().__init__(documents(6), batch_size=2, packing=False)
        sets = {}
        for seed, (name, count) in enumerate(SETS.items(), start=1):
            cache: Any = MemoryCache(documents(count, seed))
            sets[name] = PackedSet(cache, one_sample_a_row(count))
        self.val_set, self.val_files = sets.pop(None), ["memory"]
        self.named_val_sets = {name: packed for name, packed in sets.items() if name is not None}


def losses(directory: str, dp: int, sp: int, command: str) -> dict[str, float]:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dp * sp,
        precision="32-true",
        strategy=DeepSpeedSPStrategy(sequence_parallel_size=sp),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=2,
    )
    module = SFTModule(directory, learning_rate=0.0, warmup_ratio=0.0, mtp_loss_weight=0.0)
    trainer.ckpt_path = None
    if command == "fit":
        trainer.limit_train_batches = 1
        trainer.fit(module, ManySets())
    else:
        trainer.validate(module, ManySets(), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


@pytest.mark.parametrize(("dp", "sp", "command"), [(2, 1, "fit"), (2, 2, "validate")])
def test_each_set_and_all_of_them_by_target_token(dp: int, sp: int, command: str, tmp_path: Path) -> None:
    main = oracle(DEEPSEEK_V3)
    directory = save_model(main, DEEPSEEK_V3, tmp_path / "model")
    sets = {name: documents(count, seed) for seed, (name, count) in enumerate(SETS.items(), start=1)}
    expected = means(main, [document for each in sets.values() for document in each], "val")
    for name, each in sets.items():
        if name is not None:
            expected |= means(main, each, f"val/{name}")
    for found in run_distributed(losses, dp * sp, directory, dp, sp, command):
        assert found.keys() == expected.keys(), json.dumps(sorted(found))
        assert found == pytest.approx(expected, rel=1e-5)
