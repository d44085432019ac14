import pytest

from tests.models.tiny import DEEPSEEK_V3, oracle

from .training import save_model


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face directory of transformers' model of DEEPSEEK_V3 with random weights, without MTP; only read."""
    return save_model(oracle(DEEPSEEK_V3), DEEPSEEK_V3, tmp_path_factory.mktemp("model"))
