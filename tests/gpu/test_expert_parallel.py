"""Shared experts on CUDA: nobody reads what has not come, or overwrites what has not left, however slow the exchange.

Groups of one rank: NCCL's, and one whose exchanges begin late and show what is read before.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from src.models.deepseek_v3.experts import Experts
from src.strategies.expert_parallel import ProcessGroupEP

pytestmark = pytest.mark.gpu
HIDDEN, TOKENS, EXPERTS, TOP = 256, 3000, 8, 2


class Late:
    rank, size = 0, 1

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> "_Late":
        out = torch.empty_like(rows)
        out.fill_(-1 if out.dtype == torch.int32 else float("nan"))
        return _Late(self.stream, rows.contiguous(), out)


class _Late:
    def __init__(self, stream: torch.cuda.Stream, sent: Tensor, out: Tensor) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # about 10 ms
            out.copy_(sent)
            self.done = stream.record_event()
        self.sent, self.out = sent, out

    def wait(self) -> Tensor:
        torch.cuda.current_stream().wait_event(self.done)
        del self.sent
        return self.out


@pytest.fixture
def groups() -> Iterator[list[Any]]:
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore(), device_id=torch.device("cuda", 0))
    world = dist.group.WORLD
    assert world is not None
    yield [None, Late(), ProcessGroupEP(world, world)]
    dist.destroy_process_group()


def run(group: Any, most: float, layers: int = 3) -> list[Tensor]:
    """Layers of experts one after another, with work between that takes up freed memory at once."""
    torch.manual_seed(0)
    made = [Experts(EXPERTS, 2, HIDDEN, 64).to("cuda", torch.bfloat16) for _ in range(layers)]
    start = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    beside = torch.randn(HIDDEN, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    x = start * 1
    for experts in made:
        for parameter in experts.parameters():
            parameter.data.normal_(0, 0.1)
        weights, chosen = torch.rand(TOKENS, TOP, device="cuda"), torch.rand(TOKENS, EXPERTS, device="cuda").argsort(1)
        if group is not None:
            experts.share(group, most)
        way = experts.set_out(x, weights, experts.route(chosen[:, :TOP]))
        shared = x @ beside
        for _ in range(8):
            torch.randn(2 * TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
        x = experts(x, weights, way) + shared * 0.1
    x.backward(torch.randn_like(x))
    grads = [start.grad, beside.grad, *(p.grad for experts in made for p in experts.parameters())]
    return [x.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("most", [1.0, 0.3])
def test_a_late_exchange_changes_nothing(most: float, groups: list[Any]) -> None:
    alone, late, nccl = (run(group, most) for group in groups)
    assert len(alone) == 3 + 3 * 8
    for one, two, three in zip(alone, late, nccl, strict=True):
        assert torch.equal(two, three)
        assert (one.float() - two.float()).norm() <= 2e-2 * one.float().norm()
    assert all(torch.equal(a, b) for a, b in zip(late, run(groups[1], most), strict=True))
