"""Initial values: the same by whatever ranges they are read, and of the right distribution."""

import torch

from src.weights.random_source import RandomSource
from src.weights.side_files import architecture
from tests.checkpoints.tiny import CONFIG, ranges

# An embedding of several blocks of random numbers.
SOURCE = RandomSource(architecture(CONFIG | {"vocab_size": 2000}), seed=1)
EMBEDDING = "model.embed_tokens.weight"


def whole(source: RandomSource, name: str) -> torch.Tensor:
    return source.read(name, 0, torch.Size(source.shape(name)).numel())


def test_values_do_not_depend_on_the_ranges() -> None:
    values = whole(SOURCE, EMBEDDING)
    for start, stop in ranges(SOURCE.shape(EMBEDDING), count=20):
        assert torch.equal(SOURCE.read(EMBEDDING, start, stop), values[start:stop])


def test_matrices_are_normal() -> None:
    values = whole(SOURCE, EMBEDDING)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.std(), torch.tensor(0.02), rtol=0.01, atol=0)
    assert values.mean().abs() < 2e-4
    blocks = values[: 4 * 65536].view(4, -1)
    assert (torch.corrcoef(blocks) - torch.eye(4)).abs().max() < 0.02  # no block repeats another


def test_norms_are_ones_and_biases_zeros() -> None:
    for name in SOURCE.names():
        if name.endswith("norm.weight"):
            assert (whole(SOURCE, name) == 1).all(), name
        elif name.endswith("bias"):
            assert (whole(SOURCE, name) == 0).all(), name
        else:
            assert whole(SOURCE, name).std() > 0.01, name


def test_seed_and_name_decide() -> None:
    one, other = (f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (0, 1))
    assert not torch.equal(whole(SOURCE, one), whole(SOURCE, other))
    assert torch.equal(whole(RandomSource(architecture(CONFIG), seed=1), one), whole(SOURCE, one))
    assert not torch.equal(whole(RandomSource(architecture(CONFIG), seed=2), one), whole(SOURCE, one))
