"""`verify` on real directories: it agrees, it notices a wrong weight, it refuses what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from src.commands import verify as module
from src.commands.verify import verify
from tests.distributed.training import save_model
from tests.models.tiny import CONFIGS, oracle


@pytest.mark.parametrize("name", CONFIGS)
def test_it_agrees_with_transformers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(save_model(oracle(CONFIGS[name]), CONFIGS[name], tmp_path))
    assert capsys.readouterr().out.count(" ok") == 3


@pytest.mark.parametrize("wrong_value", [0.1, float("nan")])
def test_it_notices_a_model_that_differs(wrong_value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_model(oracle(CONFIGS["deepseek_v3"]), CONFIGS["deepseek_v3"], tmp_path)
    right = module._oracle

    def wrong(*args: Any) -> Any:
        model = right(*args)
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[0, 0, 0] += wrong_value
        return model

    monkeypatch.setattr(module, "_oracle", wrong)
    with pytest.raises(SystemExit, match="does not agree"):
        verify(directory)


def test_it_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_model(oracle(CONFIGS["moonlight"]), CONFIGS["moonlight"], tmp_path)
    memory = type("Memory", (), {"available": 2**10})
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(ValueError, match=r"parameters need .* GiB here .* are free"):
        verify(directory)
