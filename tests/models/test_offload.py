"""What waits in host memory comes back as it was, and takes as much memory as the longest row, whatever rows come."""

import pytest
import torch

from src.models.deepseek_v3 import DeepseekV3ForCausalLM
from src.models.deepseek_v3.attention import Attention
from src.models.deepseek_v3.moe import MoE
from src.models.offload import HostStack

from .tiny import DEEPSEEK_V3, oracle, ours


def offloading(attention_output: str = "offload", layer_input: str = "offload") -> DeepseekV3ForCausalLM:
    from src.strategies.parallelize import apply_activation_checkpointing

    model = ours(DEEPSEEK_V3, oracle(DEEPSEEK_V3))
    model.host = HostStack(also_cpu=True)
    model.set_kept(attention_output, layer_input)
    apply_activation_checkpointing(model)
    return model


def loss(model: DeepseekV3ForCausalLM, tokens: int) -> torch.Tensor:
    torch.manual_seed(tokens)
    ids = torch.randint(DEEPSEEK_V3["vocab_size"], (tokens,))
    bounds = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    value: torch.Tensor = model(ids, ids.roll(-1), bounds, tokens - tokens // 2).loss
    return value


LENGTHS = [24, 7, 48, 13, 31, 48, 9, 40]


@pytest.mark.parametrize("kept", [("offload", "offload"), ("offload", "keep"), ("recompute", "offload")], ids="-".join)
def test_rows_of_many_lengths_share_the_memory_of_the_longest(kept: tuple[str, str]) -> None:
    model, plain = offloading(*kept), ours(DEEPSEEK_V3, oracle(DEEPSEEK_V3))
    model.host.longest = max(LENGTHS)
    loss(model, max(LENGTHS)).backward()
    full = model.host.nbytes
    for tokens in LENGTHS:
        model.zero_grad()
        plain.zero_grad()
        loss(model, tokens).backward()
        loss(plain, tokens).backward()
        for (name, ours_), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert ours_.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours_.grad, theirs.grad, msg=name)
        assert model.host.nbytes == full > 0


def test_a_short_row_first_reserves_for_the_longest() -> None:
    model, other = offloading(), offloading()
    model.host.longest = 48
    loss(model, 24).backward()
    loss(other, 48).backward()
    assert model.host.nbytes == other.host.nbytes


def test_what_no_backward_pass_took_is_dropped() -> None:
    model = offloading()
    loss(model, 12)
    held = model.host.nbytes
    with torch.no_grad():
        loss(model, 12)  # an evaluation may stand between a forward pass and its backward
    assert model.host._waiting
    loss(model, 12).backward()
    assert not model.host._waiting and model.host.nbytes == held


def test_frozen_bottom_layers_keep_nothing() -> None:
    model = offloading()
    loss(model, 16).backward()
    full = model.host.nbytes
    frozen = offloading()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(not name.startswith(("model.embed_tokens", "model.layers.0.", "model.layers.1.")))
    loss(frozen, 16).backward()
    layers = DEEPSEEK_V3["num_hidden_layers"]
    assert frozen.host.nbytes == full * (layers - 2) // layers
    kept = [module.kept for module in frozen.modules() if isinstance(module, Attention | MoE)]
    assert kept and all(one is not None and not one._results for one in kept)


def test_tensors_on_the_cpu_stay_where_they_are() -> None:
    stack, tensor = HostStack(), torch.zeros(3)
    assert stack.take(stack.put(tensor)) is tensor


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_as_many_are_fetched_as_a_layer_leaves(ahead: int) -> None:
    stack = HostStack(also_cpu=True)
    stack.begin(4)
    items = [stack.put(torch.full((4,), float(value))) for value in range(5)]
    stack.ahead = ahead
    assert stack.take(items.pop()).tolist() == [4.0] * 4
    assert [item.fetched is not None for item in reversed(items)] == [place < ahead for place in range(4)]
