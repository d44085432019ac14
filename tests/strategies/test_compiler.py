"""DeepSpeed's operators need a C++ compiler; a missing one is named before the first build."""

import os
import shutil

import pytest
import torch

from src.strategies import DeepSpeedSPStrategy


@pytest.mark.parametrize("present", [[], ["clang++"], ["c++", "g++"]])
def test_the_compiler_is_found_or_named(present: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    strategy = DeepSpeedSPStrategy(parallel_devices=[torch.device("cpu")])
    monkeypatch.setattr(DeepSpeedSPStrategy, "root_device", torch.device("cpu"))
    monkeypatch.setattr(shutil, "which", lambda name: name if name in present else None)
    if not present:
        with pytest.raises(ValueError, match="no C\\+\\+ compiler found .*apt-get install g"):
            strategy._check_compiler()
    else:
        strategy._check_compiler()
        assert os.environ["CXX"] == present[0]
