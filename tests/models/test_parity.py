"""Logits and every gradient against transformers' DeepseekV3ForCausalLM, fp32, packed documents, everything on."""

import contextlib
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from src.models.deepseek_v3.moe import Router
from src.models.deepseek_v3.recompute import recompute
from src.models.kernels import ATTENTION
from src.models.loss import IGNORE_INDEX

from .tiny import CONFIGS, oracle, ours, relative, stacked_gradients

LENGTHS = [37, 1, 52, 8]


def packed_row(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (sum(LENGTHS),), generator=generator)
    labels = torch.randint(vocab_size, (sum(LENGTHS),), generator=generator)
    labels[torch.rand(len(labels), generator=generator) < 0.3] = IGNORE_INDEX
    return ids, labels, torch.tensor([0, *LENGTHS]).cumsum(0).int()


@pytest.mark.parametrize("checkpointing", [None, "recompute", "keep", "offload"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name: str, checkpointing: str | None) -> None:
    fields = CONFIGS[name]
    reference = oracle(fields)
    model = ours(fields, reference, experts_per_shard=2)
    ids, labels, cu_seqlens = packed_row(fields["vocab_size"])
    if checkpointing:
        model.run_layer = partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), recompute())
        )
        model.set_kept(checkpointing, "offload" if checkpointing == "offload" else "keep")

    # The oracle sees each document alone: no packing, no mask of ours.
    logits = torch.cat([reference(document[None]).logits[0] for document in ids.split(LENGTHS)])
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    loss.backward()

    assert relative(model.logits(ids, cu_seqlens, max(LENGTHS)), logits) < 1e-5
    sums = model(ids, labels, cu_seqlens, max(LENGTHS))
    assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert sums.correct == (logits.argmax(-1) == labels).sum()
    (sums.loss * 0.5).backward()  # a scaled loss: both of the head's gradients must follow
    gradients = stacked_gradients(model)
    expected = dict(reference.named_parameters())
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        wanted = expected[parameter].grad
        assert wanted is not None and wanted.norm() > 0, parameter
        assert relative(gradient * 2, wanted) < 1e-4, parameter


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"routed_scaling_factor": 1.0}, "the guide's first error: no scaling where norm_topk_prob is on"),
        ({"rope_scaling": None}, "the guide's second: YaRN and its mscale lost"),
        ({"n_group": 1, "topk_group": 1}, "groups ignored"),
        ({"rms_norm_eps": 1e-2}, "the norms' epsilon"),
    ],
)
def test_parity_would_catch(change: dict[str, object], where: str) -> None:
    reference = oracle(CONFIGS["deepseek_v3"])
    model = ours(CONFIGS["deepseek_v3"] | change, reference)
    ids, _, cu_seqlens = packed_row(96)
    logits = torch.cat([reference(document[None]).logits[0] for document in ids.split(LENGTHS)])
    assert relative(model.logits(ids, cu_seqlens, max(LENGTHS)), logits) > 1e-3, where


def test_router_bias_chooses_but_does_not_weigh() -> None:
    reference = oracle(CONFIGS["deepseek_v3"])
    model = ours(CONFIGS["deepseek_v3"], reference)
    gate = next(module for module in model.modules() if isinstance(module, Router))
    x = torch.randn(50, 32)
    gate.e_score_correction_bias.zero_()
    gate.e_score_correction_bias[5] = 3.0  # above every affinity, and its group wins with it
    scores = gate(x)
    chosen = gate.choose(scores)
    weights = gate.weigh(scores, chosen)
    assert (chosen == 5).any(-1).all()
    expected = scores.gather(1, chosen)
    torch.testing.assert_close(weights, 2.5 * expected / expected.sum(-1, keepdim=True))


def test_what_is_kept_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = CONFIGS["deepseek_v3"]
    model = ours(fields, oracle(fields), experts_per_shard=2)
    model.run_layer = partial(
        checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), recompute())
    )
    ids, labels, cu_seqlens = packed_row(fields["vocab_size"])
    kernel, calls = ATTENTION["sdpa"], {"forward": 0, "backward": 0}

    def counted(name: str) -> None:
        original = getattr(type(kernel), name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(type(kernel), name, call)

    for name in calls:
        counted(name)
    model.set_kept("keep", "keep")
    for step in (1, 2):  # the second step finds nothing of the first
        with torch.no_grad():
            model(ids, labels, cu_seqlens, max(LENGTHS))  # an evaluation keeps nothing
        model(ids, labels, cu_seqlens, max(LENGTHS)).loss.backward()
        assert calls == {"forward": 3 * step, "backward": 3 * step}
        model(ids, labels, cu_seqlens, max(LENGTHS))  # a forward pass without its backward
        calls["forward"] -= 3
