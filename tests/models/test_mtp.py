"""The multi-token prediction against transformers' MtpModel: its loss and every gradient, fp32, packed documents."""

import pytest
import torch

from src.models.deepseek_v3 import DeepseekV3ForCausalLM, LossWeights, config_from_dict
from src.models.deepseek_v3.layers import MTPLayer
from src.models.loss import IGNORE_INDEX
from src.strategies.parallelize import apply_activation_checkpointing

from .tiny import (
    CONFIGS,
    DEEPSEEK_V3,
    Sample,
    mtp_oracle,
    needs_mtp_oracle,
    oracle,
    oracle_losses,
    oracle_tensors,
    ours,
    packed,
    relative,
    samples,
    stacked_gradients,
)

WEIGHTS = LossWeights(cross_entropy=1.0, mtp=0.3)
LAYER = f"model.layers.{DEEPSEEK_V3['num_hidden_layers']}."


def documents(vocab_size: int = DEEPSEEK_V3["vocab_size"]) -> list[Sample]:
    lengths = [37, 1, 2, 50, 3]  # one and two tokens: no target after the next
    return samples([range(vocab_size)] * len(lengths), lengths)


def random_model(vocab_size: int = DEEPSEEK_V3["vocab_size"]) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    config = config_from_dict(DEEPSEEK_V3 | {"vocab_size": vocab_size})
    model = DeepseekV3ForCausalLM(config, experts_per_shard=2, with_mtp=True)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    return model


@needs_mtp_oracle
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_equal_transformers(name: str, checkpointing: bool) -> None:
    fields = CONFIGS[name] | {"num_nextn_predict_layers": 1}
    reference = oracle(fields)
    mtp = mtp_oracle(reference)
    model = ours(fields, reference, experts_per_shard=2, mtp=mtp)
    if checkpointing:
        apply_activation_checkpointing(model)

    cross_entropy, mtp_cross_entropy = oracle_losses(reference, mtp, documents())
    total = cross_entropy + 0.3 * mtp_cross_entropy
    total.backward()
    losses = model(**packed(documents(), padding=5), weights=WEIGHTS)
    (losses.loss * 0.5).backward()  # a scaled loss: all gradients must follow

    assert losses.loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert losses.mtp.item() == pytest.approx(mtp_cross_entropy.item(), rel=1e-6)
    assert losses.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-6)
    assert losses.token_losses.sum().item() == pytest.approx(cross_entropy.item(), rel=1e-6)
    assert losses.balance == 0
    gradients = stacked_gradients(model)
    expected = oracle_tensors(reference, mtp)
    assert gradients.keys() == {name for name, tensor in expected.items() if tensor.requires_grad}
    assert any(name.startswith(LAYER) for name in gradients)
    for parameter, gradient in gradients.items():
        wanted = expected[parameter].grad
        assert wanted is not None and wanted.norm() > 0, parameter
        assert relative(gradient * 2, wanted) < 1e-4, parameter


@needs_mtp_oracle
@pytest.mark.parametrize("swapped", ["eh_proj", "norms", "embedding and hidden", "shared_head.norm"])
def test_the_comparison_would_catch(swapped: str) -> None:
    reference = oracle(DEEPSEEK_V3 | {"num_nextn_predict_layers": 1})
    mtp = mtp_oracle(reference)
    model = ours(DEEPSEEK_V3, reference, mtp=mtp)
    block = model.model.layers[-1]
    assert isinstance(block, MTPLayer)
    with torch.no_grad():
        if swapped == "eh_proj":  # the report's order: the hidden state first
            block.eh_proj.weight.copy_(block.eh_proj.weight.roll(DEEPSEEK_V3["hidden_size"], 1))
        elif swapped == "norms":
            block.enorm, block.hnorm = block.hnorm, block.enorm
        elif swapped == "shared_head.norm":
            block.shared_head.norm = model.model.norm
    inputs = packed(documents())
    if swapped == "embedding and hidden":  # this token's embedding instead of the next one's
        inputs["mtp_input_ids"] = inputs["input_ids"]
    _, expected = oracle_losses(reference, mtp, documents())
    assert abs(model(**inputs, weights=WEIGHTS).mtp.item() / expected.item() - 1) > 1e-4


def test_what_stands_for_the_next_token_at_a_documents_end_is_nothing() -> None:
    inputs = packed(documents(), padding=5)
    ends = inputs["cu_seqlens"][1:].long() - 1

    def run(mtp_input_ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        model = random_model()
        losses = model(**inputs | {"mtp_input_ids": mtp_input_ids}, weights=WEIGHTS)
        losses.loss.backward()
        return losses.mtp.item(), stacked_gradients(model)

    plain, gradients = run(inputs["mtp_input_ids"])
    for tokens in (torch.full_like(ends, 95), torch.arange(len(ends)) + 11):
        loss, others = run(inputs["mtp_input_ids"].scatter(0, ends, tokens))
        assert loss == pytest.approx(plain, rel=1e-6)
        for name, gradient in gradients.items():
            assert relative(others[name], gradient) < 1e-5, name
    inside, _ = run(inputs["mtp_input_ids"].scatter(0, torch.tensor([20]), torch.tensor([95])))
    assert inside != pytest.approx(plain, rel=1e-5)


def test_targets_of_the_mtp_alone_weigh_as_told() -> None:
    # So few tokens that some are predicted by chance, by the MTP too, where they must not count.
    model, inputs = random_model(vocab_size=8), packed(documents(vocab_size=8))
    losses = model(**inputs, weights=LossWeights(cross_entropy=0.0, mtp=2.0))
    assert losses.loss.item() == pytest.approx(2 * losses.mtp.item(), rel=1e-6)
    plain = model(**inputs)  # the next token's numbers do not change with it
    assert torch.equal(losses.token_losses, plain.token_losses) and losses.correct == plain.correct
    assert losses.cross_entropy == plain.cross_entropy > 0
    nothing = model(**inputs | {"mtp_labels": torch.full_like(inputs["labels"], IGNORE_INDEX)}, weights=WEIGHTS)
    assert nothing.mtp == 0 and nothing.loss.item() == pytest.approx(losses.cross_entropy.item(), rel=1e-6)


def test_a_weight_of_zero_computes_nothing_of_it() -> None:
    model, inputs = random_model(), packed(documents())
    called = []
    model.model.layers[-1].register_forward_hook(lambda *_: called.append(True))
    losses = model(**inputs, weights=LossWeights())
    losses.loss.backward()
    assert losses.mtp == 0 and not called
    assert losses.loss.item() == pytest.approx(losses.cross_entropy.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(LAYER), name
    del inputs["mtp_input_ids"], inputs["mtp_labels"]  # nor are its inputs needed
    assert model(**inputs).loss == losses.loss


def test_without_the_block_there_is_no_parameter_of_it() -> None:
    names = [name for name, _ in DeepseekV3ForCausalLM(config_from_dict(DEEPSEEK_V3)).named_parameters()]
    assert not [name for name in names if name.startswith(LAYER)]
    with_block = {name for name, _ in random_model().named_parameters() if name.startswith(LAYER)}
    own = {f"{LAYER}{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}
    assert own <= with_block
    block = {name.removeprefix(LAYER) for name in with_block - own}
    last = {
        name.removeprefix("model.layers.2.") for name, _ in random_model().named_parameters() if ".layers.2." in name
    }
    assert block == last  # a layer with experts, under the names of every other
