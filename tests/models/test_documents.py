"""Documents of a packed row neither see nor move one another: logits, losses, gradients, positions.

Each document has its own part of the vocabulary, so that a gradient tells whose tokens it comes from. Token 0, which
stands for the missing next token at a document's end, is nobody's.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from src.models.deepseek_v3 import DeepseekV3ForCausalLM, LossWeights, config_from_dict
from src.models.deepseek_v3.rope import positions
from src.models.loss import IGNORE_INDEX

from .tiny import DEEPSEEK_V3, MOONLIGHT, Sample, packed, relative, samples

LENGTHS = [9, 1, 40, 6]  # one token alone, and one beyond the context that YaRN stretches
VOCABULARY = [range(1, 24), range(24, 48), range(48, 72), range(72, 96)]
PADDING = 3
BOTH = LossWeights(cross_entropy=1.0, mtp=0.3)
MODELS = pytest.mark.parametrize("fields", [DEEPSEEK_V3, MOONLIGHT], ids=["deepseek_v3", "moonlight"])
EACH = pytest.mark.parametrize("index", range(len(LENGTHS)))


def build(fields: dict[str, Any]) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config_from_dict(fields), experts_per_shard=2, with_mtp=True)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    for router in model.routers:
        torch.nn.init.normal_(router.e_score_correction_bias, std=0.2)
    return model


def row(seed: int = 1) -> list[Sample]:
    """Every token but a document's first a target, so that no leak hides behind a mask."""
    return [(ids, torch.ones_like(ids, dtype=torch.bool)) for ids, _ in samples(VOCABULARY, LENGTHS, seed)]


def replaced(seed: int, kept: int) -> list[Sample]:
    """The row with other tokens in all documents but one."""
    return [mine if i == kept else other for i, (mine, other) in enumerate(zip(row(), row(seed), strict=True))]


def slice_of(index: int) -> slice:
    start = sum(LENGTHS[:index])
    return slice(start, start + LENGTHS[index])


def logits(model: DeepseekV3ForCausalLM, documents: list[Sample], padding: int = PADDING) -> Tensor:
    inputs = packed(documents, padding)
    with torch.no_grad():
        return model.logits(inputs["input_ids"], inputs["cu_seqlens"], inputs["max_seqlen"])


def of_document(documents: list[Sample], index: int) -> dict[str, Any]:
    """The row's inputs with the targets of one document alone."""
    inputs = packed(documents, PADDING)
    others = inputs["document_ids"] != index
    return inputs | {name: inputs[name].masked_fill(others, IGNORE_INDEX) for name in ("labels", "mtp_labels")}


@MODELS
def test_no_single_token_reaches_another_document(fields: dict[str, Any]) -> None:
    model, inputs = build(fields), packed(row(), PADDING)
    ids, owner = inputs["input_ids"], inputs["document_ids"]
    targets = ("labels", "mtp_labels")

    def run(changed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out = model(**inputs | changed)
            return model.logits(changed["input_ids"], inputs["cu_seqlens"], inputs["max_seqlen"]), out.token_losses

    plain_logits, plain_losses = run({"input_ids": ids})
    for place in range(len(ids)):  # of the padding too
        tokens = ids.clone()
        tokens[place] = (tokens[place] + 31) % 95 + 1
        # Also as what is to be predicted and what the MTP block reads, though of its own document alone.
        changed = {"input_ids": tokens} | {name: inputs[name].clone() for name in (*targets, "mtp_input_ids")}
        for name, ahead in (("labels", 1), ("mtp_labels", 2), ("mtp_input_ids", 1)):
            if place >= ahead and owner[place - ahead] == owner[place] >= 0:
                changed[name][place - ahead] = tokens[place]
        new_logits, new_losses = run(changed)
        other = owner != owner[place]
        torch.testing.assert_close(new_logits[other], plain_logits[other], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(new_losses[other], plain_losses[other], rtol=1e-6, atol=1e-6)
        # Causal within its own document, and seen there.
        torch.testing.assert_close(new_logits[:place], plain_logits[:place], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(new_logits[place], plain_logits[place], rtol=1e-3, atol=1e-3)


@MODELS
@EACH
def test_a_documents_loss_and_gradients_are_its_own(fields: dict[str, Any], index: int) -> None:
    """With the multi-token prediction on; the other documents' tokens changed, all of them at once."""

    def run(documents: list[Sample]) -> tuple[Tensor, dict[str, Tensor]]:
        model = build(fields)
        out = model(**of_document(documents, index), weights=BOTH)
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return torch.stack([out.loss.detach(), out.cross_entropy, out.mtp]), gradients

    plain, gradients = run(row())
    embedding = gradients["model.embed_tokens.weight"]
    own = torch.zeros(len(embedding), dtype=torch.bool)
    own[row()[index][0]] = True
    assert not embedding[~own].any()  # exactly zero: nobody else's token, nor token 0
    if LENGTHS[index] > 1:
        assert embedding[row()[index][0][:-1]].any(-1).all()
    for seed in (2, 3):
        losses, others = run(replaced(seed, kept=index))
        torch.testing.assert_close(losses, plain, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            assert torch.equal(others[name], gradient) or relative(others[name], gradient) < 1e-5, name


@MODELS
@EACH
def test_a_document_is_the_same_alone_and_wherever_it_stands(fields: dict[str, Any], index: int) -> None:
    model, documents = build(fields), row()
    mine = documents.pop(index)
    alone = packed([mine])
    expected, expected_losses = logits(model, [mine], 0), model(**alone, weights=BOTH)
    for before in range(len(LENGTHS)):
        order = [*documents[:before], mine, *documents[before:]]
        start = sum(len(ids) for ids, _ in documents[:before])
        place = slice(start, start + len(mine[0]))
        torch.testing.assert_close(logits(model, order)[place], expected, rtol=1e-5, atol=1e-5)
        losses = model(**of_document(order, before), weights=BOTH)
        torch.testing.assert_close(losses.token_losses[place], expected_losses.token_losses, rtol=1e-5, atol=1e-5)
        assert losses.mtp.item() == pytest.approx(expected_losses.mtp.item(), rel=1e-6)


def test_positions_restart_in_each_document() -> None:
    """Logits cannot tell: rotary embedding sees differences alone, until far places lose digits in fp32."""
    cu_seqlens = packed(row(), PADDING)["cu_seqlens"]
    expected = torch.cat([torch.arange(length) for length in [*LENGTHS, PADDING]])
    assert torch.equal(positions(cu_seqlens, len(expected)), expected)


def test_the_data_would_show_a_leak() -> None:
    model, inputs = build(DEEPSEEK_V3), packed(row())
    together = model(**inputs, weights=BOTH)
    total = len(inputs["input_ids"])
    merged = inputs | {"cu_seqlens": torch.tensor([0, total], dtype=torch.int32), "max_seqlen": total}
    leaking = model(**merged | {"document_ids": torch.zeros_like(inputs["document_ids"])}, weights=BOTH)
    first, second = slice_of(0), slice_of(2)
    torch.testing.assert_close(leaking.token_losses[first], together.token_losses[first])
    assert not torch.allclose(leaking.token_losses[second], together.token_losses[second], rtol=1e-3, atol=1e-3)
    assert leaking.mtp.item() != pytest.approx(together.mtp.item(), rel=1e-4)


def test_without_document_ids_every_token_belongs_to_the_document_of_its_place() -> None:
    model, inputs = build(DEEPSEEK_V3), packed(row())
    model.set_balance(True)
    weights = LossWeights(1.0, 0.3, 0.1)
    given = model(**inputs, weights=weights)
    found = model(**inputs | {"document_ids": None}, weights=weights)
    assert found.loss == given.loss and found.balance == given.balance
