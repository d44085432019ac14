"""Linear projection to the vocabulary and cross-entropy in one, in chunks, without keeping logits.

Sources: cross-entropy's gradient is softmax - one_hot; computing it in the forward pass, chunk by chunk, is the
arrangement of Liger Kernel (arXiv 2410.10989), here with both gradients summed in fp32.

Legend: T tokens, H hidden, V vocabulary, C chunk of tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .kernels import add_matmul_fp32, cross_entropy_rows, matmul_fp32
from .loss_chunks import GRAD_CHUNKS, chunk_tokens

IGNORE_INDEX = -100


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, sections: list[tuple[int, float]], with_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = len(hidden)
        losses = hidden.new_empty(tokens, dtype=torch.float32)
        correct = hidden.new_empty(tokens, dtype=torch.bool)
        grad_hidden = torch.empty_like(hidden) if with_grad and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_grad and ctx.needs_input_grad[1] else None
        loss = losses.new_zeros(())
        begin = 0
        for count, factor in sections:
            own = slice(begin, begin + count)
            own_grad = None if grad_hidden is None else grad_hidden[own]
            _add_section(hidden[own], weight, labels[own], factor, losses[own], correct[own], own_grad, grad_weight)
            loss += factor * losses[own].sum()
            begin += count
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses, correct)
        return loss, losses, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        rounded = None if grad_weight is None else torch.empty_like(grad_weight, dtype=ctx.dtype)
        return (
            None if grad_hidden is None else (grad_hidden * grad).to(grad_hidden.dtype),
            None if rounded is None else torch.mul(grad_weight, grad, out=rounded),  # in one pass
            *(None, None, None),
        )


def _add_section(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    factor: float,
    losses: Tensor,
    correct: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Fills `losses`, `correct` and `grad_hidden` of these tokens and adds to `grad_weight`.

    The factor comes in as the products' own, in fp32: it would round every gradient of a logit otherwise, all alike.
    """
    chunk = chunk_tokens(len(weight))
    with_grad = grad_hidden is not None or grad_weight is not None
    for start in range(0, len(hidden), chunk * GRAD_CHUNKS):
        group = slice(start, start + chunk * GRAD_CHUNKS)
        x = hidden[group]  # [G, H]
        grad = x.new_empty(len(x), len(weight)) if with_grad else None
        for first in range(0, len(x), chunk):
            own = slice(start + first, min(start + first + chunk, len(hidden)))
            logits = matmul_fp32(hidden[own], weight.T)  # [C, V]
            own_grad = None if grad is None else grad[first : first + chunk]
            cross_entropy_rows(logits, labels[own], losses[own], correct[own], own_grad)
            del logits
        if grad is None:
            continue
        if grad_hidden is not None:
            torch.addmm(grad_hidden[group], grad, weight, beta=0, alpha=factor, out=grad_hidden[group])
        if grad_weight is not None:
            add_matmul_fp32(grad_weight, grad.T, x, factor)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, sections: Sequence[tuple[int, float]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies of softmax(hidden weight^T) and their sum, each times its section's factor.

    Args:
        hidden: [T, H].
        weight: [V, H].
        labels: int64 [T], `IGNORE_INDEX` where a token is no target; such tokens cost nothing.
        sections: consecutive runs of the T tokens, each its length and its factor.

    Returns:
        The weighted sum in nats, an fp32 scalar, the only one with a gradient (backward once only); each token's own
        cross-entropy, fp32 [T], zero where it is no target; bool [T], whether its label has the largest logit.
    """
    is_target = labels != IGNORE_INDEX
    counts = torch.stack([part.sum() for part in is_target.split([n for n, _ in sections])]).tolist()
    targets = is_target.nonzero().squeeze(-1)
    kept = [(count, factor) for count, (_, factor) in zip(counts, sections, strict=True)]
    # Asked here: inside, no gradient is ever enabled, and what an input needs does not say whether one will come.
    with_grad = torch.is_grad_enabled()
    loss, losses, correct = _LinearCrossEntropy.apply(hidden[targets], weight, labels[targets], kept, with_grad)
    every = losses.new_zeros(len(labels)).index_copy_(0, targets, losses)
    return loss, every, torch.zeros_like(labels, dtype=torch.bool).index_copy_(0, targets, correct)
