"""An FP8 export in transformers, which dequantises it to BF16 where there is no GPU. It needs the package accelerate.

transformers 5.24 dequantises only weights whose rows and columns are a multiple of the number of blocks. DeepSeek-V3's
kv_a_proj_with_mqa, 576 rows in 5 blocks, is not; so the real model needs a GPU there, and this one has other widths.
"""

from pathlib import Path

import pytest
import torch

from src.commands.export import export
from tests.checkpoints.synthetic import save_checkpoint
from tests.checkpoints.tiny import CONFIG, dequantised, stored

pytest.importorskip("accelerate", reason="transformers loads FP8 with accelerate alone: pip install accelerate")

FIELDS = CONFIG | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "kv_lora_rank": 96,
    "moe_intermediate_size": 128,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}


def test_transformers_dequantises_it_as_we_do(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_checkpoint(tmp_path / "ckpt", FIELDS, 4)
    export(str(tmp_path / "ckpt"), str(tmp_path / "out"), "fp8")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    expected = dequantised(stored(tmp_path / "out"))
    for name, tensor in model.state_dict().items():
        base, stacked, kind = name.partition(".mlp.experts.")
        if not stacked:
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
            continue
        for index, expert in enumerate(tensor):
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            whole = torch.cat([expected[f"{base}.mlp.experts.{index}.{part}.weight"] for part in parts])
            assert torch.equal(expert, whole.bfloat16()), (name, index)
    with torch.no_grad():
        assert model(torch.arange(20)[None]).logits.isfinite().all()
