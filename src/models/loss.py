"""Linear projection to the vocabulary and cross-entropy in one, in chunks, without keeping logits.

Sources: cross-entropy's gradient is softmax - one_hot; computing it in the forward pass, chunk by chunk, is the
arrangement of Liger Kernel (arXiv 2410.10989), here with both gradients summed in fp32.

Legend: T tokens, H hidden, V vocabulary, C chunk of tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 2**27  # logits of a chunk: 512 MiB in fp32, 1,038 tokens of DeepSeek-V3's vocabulary


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunk = max(1, CHUNK_ELEMENTS // len(weight))
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        correct = hidden.new_empty(len(hidden), dtype=torch.bool)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            x, y = hidden[part], labels[part, None]  # [C, H], [C, 1]
            logits = (x @ weight.T).float()  # [C, V]
            correct[part] = logits.argmax(-1) == y[:, 0]
            log_sum = logits.logsumexp(-1, keepdim=True)
            losses[part] = (log_sum - logits.gather(-1, y))[:, 0]
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logits.sub_(log_sum).exp_()  # softmax, in the logits' memory
            grad.scatter_add_(-1, y, grad.new_full(y.shape, -1.0))
            grad = grad.mul_(scale[part, None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses, correct)
        return (losses * scale).sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grad).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtype),
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies of softmax(hidden weight^T) and their sum, each times its token's scale.

    Args:
        hidden: [T, H].
        weight: [V, H].
        labels: int64 [T], `IGNORE_INDEX` where a token is no target; such tokens cost nothing.
        scale: fp32 [T].

    Returns:
        The scaled sum in nats, an fp32 scalar, the only one with a gradient (backward once only); each token's own
        cross-entropy, fp32 [T], zero where it is no target; bool [T], whether its label has the largest logit.
    """
    targets = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
    loss, losses, correct = _LinearCrossEntropy.apply(hidden[targets], weight, labels[targets], scale[targets])
    every = losses.new_zeros(len(labels)).index_copy_(0, targets, losses)
    return loss, every, torch.zeros_like(labels, dtype=torch.bool).index_copy_(0, targets, correct)
