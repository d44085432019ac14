"""The sequence-wise balance loss against the paper's equations in plain loops, and the routers' load counts.

The whole model's is computed in transformers' model: hooks on its routers, each document alone in its own pass.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src.models.deepseek_v3 import DeepseekV3ForCausalLM, LossWeights, SingleProcess
from src.models.deepseek_v3.moe import sequence_balance
from src.models.deepseek_v3.row import RowGeometry
from src.strategies.parallelize import apply_activation_checkpointing

from .tiny import (
    CONFIGS,
    DEEPSEEK_V3,
    MtpModel,
    Sample,
    mtp_oracle,
    oracle,
    oracle_losses,
    oracle_tensors,
    ours,
    packed,
    relative,
    samples,
    stacked_gradients,
)

TOP_K = DEEPSEEK_V3["num_experts_per_tok"]
MOE_LAYERS = DEEPSEEK_V3["num_hidden_layers"] - DEEPSEEK_V3["first_k_dense_replace"]
LENGTHS = [37, 1, 50, 8]


def documents(vocab_size: int = DEEPSEEK_V3["vocab_size"]) -> list[Sample]:
    return samples([range(vocab_size)] * len(LENGTHS), LENGTHS)


def paper(scores: Tensor, top_k: int) -> Tensor:
    """Equations 17 to 20 with alpha 1, of one sequence's affinities s [T, E]."""
    tokens, experts = scores.shape
    chosen = [sorted(range(experts), key=s.__getitem__)[-top_k:] for s in scores.tolist()]
    loss = scores.new_zeros(())
    for i in range(experts):
        frequency = experts / (top_k * tokens) * sum(i in best for best in chosen)
        share = sum((s[i] / s.sum() for s in scores), start=scores.new_zeros(())) / tokens
        loss = loss + frequency * share
    return loss


def geometry(lengths: list[int], padding: int = 0) -> RowGeometry:
    """Of a row of documents: what the balance loss reads of it."""
    members = F.pad(torch.block_diag(*(torch.ones(1, length) for length in lengths)), (0, padding))
    if padding:
        lengths, members = [*lengths, padding], F.pad(members, (0, 0, 0, 1))
    none = torch.empty(0)
    return RowGeometry(
        torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), none, none, members, torch.tensor(lengths).float()
    )


@pytest.mark.parametrize("padding", [0, 6])
def test_it_is_the_papers_and_so_is_its_gradient(padding: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(sum(LENGTHS) + padding, 8, generator=generator)
    exact = scores.double().requires_grad_()
    each = exact[: sum(LENGTHS)].split(LENGTHS)
    expected = torch.stack([len(s) * paper(s, TOP_K) for s in each]).sum()
    expected.backward()
    scores.requires_grad_()
    found = sequence_balance(scores, geometry(LENGTHS, padding), TOP_K, SingleProcess())
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert scores.grad is not None and exact.grad is not None
    assert relative(scores.grad.double(), exact.grad) < 1e-6
    assert not scores.grad[sum(LENGTHS) :].any()


def test_an_even_load_is_one_a_token_and_a_collapsed_one_experts_over_k() -> None:
    place = torch.arange(8)
    lengths = [8, 16]
    turn = (place - TOP_K * torch.arange(24)[:, None]) % 8  # token t prefers the K experts from K t on
    even = torch.where(turn < TOP_K, 0.9, 0.1)
    assert sequence_balance(even, geometry(lengths), TOP_K, SingleProcess()).item() == pytest.approx(24, rel=1e-6)
    collapsed = torch.where(place < TOP_K, 1.0, 1e-9).expand(24, -1)
    found = sequence_balance(collapsed, geometry(lengths), TOP_K, SingleProcess())
    assert found.item() == pytest.approx(24 * 8 / TOP_K, rel=1e-6)
    # Even over the row, collapsed in each document: the sequence-wise loss sees the latter.
    halves = torch.where((place < 4) == (torch.arange(24)[:, None] < 12), 1.0, 1e-9)
    by_document = sequence_balance(halves, geometry([12, 12]), 4, SingleProcess())
    by_row = sequence_balance(halves, geometry([24]), 4, SingleProcess())
    assert by_document.item() == pytest.approx(48, rel=1e-6) and by_row.item() == pytest.approx(24, rel=1e-6)


class Watched:
    """Balance sums and loads of an oracle's routers, each call being one whole document."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        self.routers: list[Any] = [
            m for module in modules for m in module.modules() if hasattr(m, "e_score_correction_bias")
        ]
        self.balance = torch.zeros(())
        self.loads = {router: torch.zeros(len(router.weight), dtype=torch.int64) for router in self.routers}
        self.moved = 0  # tokens whose choice is not the largest raw affinities
        for router in self.routers:
            router.register_forward_hook(self._hook)

    def _hook(self, router: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        x, chosen = inputs[0].flatten(0, -2), output[-1]
        scores, top_k = F.linear(x, router.weight).sigmoid(), chosen.shape[1]
        self.balance = self.balance + len(scores) * paper(scores, top_k)
        self.loads[router] += torch.bincount(chosen.flatten(), minlength=scores.shape[1])
        self.moved += int((scores.topk(top_k).indices.sort().values != chosen.sort().values).any(-1).sum())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("with_mtp", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_models_loss_load_and_gradients(name: str, with_mtp: bool, checkpointing: bool) -> None:
    if with_mtp and MtpModel is None:
        pytest.skip("this transformers has no MtpModel to compare with")
    fields = CONFIGS[name] | {"num_nextn_predict_layers": 1}
    reference = oracle(fields)
    mtp = mtp_oracle(reference) if with_mtp else None
    watched = Watched(reference) if mtp is None else Watched(reference, mtp.layers)
    model = ours(fields, reference, experts_per_shard=2, mtp=mtp)
    model.set_balance(True)
    if checkpointing:
        apply_activation_checkpointing(model)

    cross_entropy, mtp_cross_entropy = oracle_losses(reference, mtp, documents())
    total = cross_entropy + 0.3 * mtp_cross_entropy + 0.7 * watched.balance
    total.backward()
    assert watched.moved > 10  # else biases and groups in f_i would go unseen
    losses = model(**packed(documents(), padding=7), weights=LossWeights(1.0, 0.3, 0.7))
    losses.loss.backward()

    assert losses.balance.item() == pytest.approx(watched.balance.item(), rel=1e-6)
    assert losses.loss.item() == pytest.approx(total.item(), rel=1e-6)
    expected = oracle_tensors(reference, mtp)
    for parameter, gradient in stacked_gradients(model).items():
        wanted = expected[parameter].grad
        assert wanted is not None
        assert relative(gradient, wanted) < 1e-4, parameter
    # Counted in the forward alone, not again in the recompute, padding apart.
    assert len(model.routers) == len(watched.routers)
    for router, theirs in zip(model.routers, watched.routers, strict=True):
        assert router.load.sum() == sum(LENGTHS) * router.top_k
        assert torch.equal(router.load, watched.loads[theirs])


def test_its_gradient_alone_is_the_papers() -> None:
    """Without the cross-entropy, whose gradients are larger, beside it."""
    reference = oracle(DEEPSEEK_V3)
    watched = Watched(reference)
    model = ours(DEEPSEEK_V3, reference)
    model.set_balance(True)
    oracle_losses(reference, None, documents())
    (3 * watched.balance).backward()
    model(**packed(documents(), padding=7), weights=LossWeights(0.0, 0.0, 3.0)).loss.backward()
    expected = oracle_tensors(reference)
    assert expected["model.layers.2.mlp.gate.weight"].grad is not None
    for name, gradient in stacked_gradients(model).items():
        wanted = expected[name].grad
        if wanted is None:  # behind the last router
            assert not gradient.any(), name
        else:
            assert relative(gradient, wanted) < 1e-4, name


def model_of(fields: dict[str, Any]) -> DeepseekV3ForCausalLM:
    return ours(fields, oracle(fields))


def test_equal_affinities_are_one_a_token_and_layer() -> None:
    model = model_of(DEEPSEEK_V3)
    model.set_balance(True)
    for router in model.routers:
        torch.nn.init.zeros_(router.weight)
    found = model(**packed(documents(), padding=7)).balance
    assert found.item() == pytest.approx(MOE_LAYERS * sum(LENGTHS), rel=1e-6)


def test_off_by_default_by_set_balance_and_in_evaluation() -> None:
    model, inputs = model_of(DEEPSEEK_V3), packed(documents())
    assert model(**inputs).balance == 0
    model.set_balance(True)
    on = model(**inputs)
    assert on.balance > 0 and on.loss.item() == pytest.approx(on.cross_entropy.item(), rel=1e-6)  # its weight is 0
    assert model.eval()(**inputs).balance == 0
    model.train().set_balance(False)
    assert model(**inputs, weights=LossWeights(balance=1.0)).balance == 0


def test_padding_does_not_count() -> None:
    model, loads, balances = model_of(DEEPSEEK_V3), [], []
    model.set_balance(True)
    for padding in (0, 1, 40):
        balances.append(model(**packed(documents(), padding)).balance.item())
        loads.append(torch.stack([router.load.clone() for router in model.routers]))
        for router in model.routers:
            router.load.zero_()
    assert balances[1:] == pytest.approx([balances[0]] * 2, rel=1e-6)
    assert all(torch.equal(load, loads[0]) for load in loads)
    only_padding = packed(documents(), 8) | {"document_ids": torch.full((sum(LENGTHS) + 8,), -1)}
    assert model(**only_padding).balance == 0
    assert not any(router.load.any() for router in model.routers)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_load_counts_each_training_forward_once(checkpointing: bool) -> None:
    model, inputs = model_of(DEEPSEEK_V3), packed(documents(), 3)
    if checkpointing:
        apply_activation_checkpointing(model)
    model.train()
    for step in (1, 2):
        model(**inputs).loss.backward()
        assert [int(router.load.sum()) for router in model.routers] == [step * sum(LENGTHS) * TOP_K] * MOE_LAYERS
    before = [router.load.clone() for router in model.routers]
    model.eval()
    model(**inputs).loss.backward()
    with torch.no_grad():
        model.logits(inputs["input_ids"], inputs["cu_seqlens"], inputs["max_seqlen"])
    assert all(torch.equal(router.load, old) for router, old in zip(model.routers, before, strict=True))
    assert not any(name.endswith("load") for name in model.state_dict())
