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
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chunk = max(1, CHUNK_ELEMENTS // len(weight))
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = hidden.new_zeros((), dtype=torch.int64)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), chunk):
            x, y = hidden[start : start + chunk], labels[start : start + chunk, None]  # [C, H], [C, 1]
            logits = (x @ weight.T).float()  # [C, V]
            correct += (logits.argmax(-1, keepdim=True) == y).sum()
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss += (log_sum - logits.gather(-1, y)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logits.sub_(log_sum).exp_()  # softmax, in the logits' memory
            grad.scatter_add_(-1, y, grad.new_full(y.shape, -1.0))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grad).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtype),
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of softmax(hidden weight^T) over the labelled tokens.

    hidden [T, H], weight [V, H], labels int64 [T], `IGNORE_INDEX` where a token is no target. Returns the sum in nats,
    fp32, and how many targets have the largest logit, int64. Other tokens cost nothing. Backward once only.
    """
    targets = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
    return _LinearCrossEntropy.apply(hidden[targets], weight, labels[targets])
