"""Experts shared by ranks give each token what all experts in one process give it. Ranks are threads here."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from src.models.deepseek_v3 import channel
from src.models.deepseek_v3 import experts as module
from src.models.deepseek_v3.expert_parallel import Journey
from src.models.deepseek_v3.experts import Experts

E, K, H, INNER = 8, 3, 16, 8


class Threads:
    """An ExpertParallelGroup of threads, that counts what travels."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=20)
        self.boxes: list[Any] = [None] * size
        self.rows: list[list[tuple[int, ...]]] = [[] for _ in range(size)]  # by rank: shapes that it received

    def member(self, rank: int) -> "Member":
        return Member(self, rank)


class Came:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def wait(self) -> Tensor:
        rows: Tensor = self.__dict__.pop("rows")
        return rows


class Member:
    def __init__(self, group: Threads, rank: int) -> None:
        self.group, self.rank, self.size = group, rank, group.size

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Came:
        self.group.boxes[self.rank] = rows.split(list(sent))
        self.group.barrier.wait()
        found = [self.group.boxes[other][self.rank].clone() for other in range(self.size)]
        self.group.barrier.wait()
        assert [len(part) for part in found] == list(received)
        out = torch.cat(found)
        self.group.rows[self.rank].append(tuple(out.shape))
        return Came(out)


def experts(dtype: torch.dtype = torch.float32, shard: int = 1) -> Experts:
    made = Experts(E, shard, H, INNER).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def run(made: Experts, x: Tensor, weights: Tensor, chosen: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    way = made.route(chosen)
    out = made(x, weights, made.set_out(x, weights, way))
    out.backward(grad)
    if isinstance(way, Journey):
        held = [name for name, value in vars(way).items() if isinstance(value, Tensor)]
        assert held == ["_rows"]  # one number for each shard; the rest is given up, though `out` is there
    assert x.grad is not None and weights.grad is not None
    gradients = {f"grad of {name}": p.grad for name, p in made.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(made.parameters()))
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad} | gradients


Choice = Callable[[int, torch.Generator], Tensor]


def anyhow(tokens: int, generator: torch.Generator) -> Tensor:
    return torch.rand(tokens, E, generator=generator).argsort(1)[:, :K]


def first_rank_alone(tokens: int, generator: torch.Generator) -> Tensor:
    return torch.rand(tokens, K, generator=generator).argsort(1)  # experts 0, 1 and 2


def never_five(tokens: int, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(tokens, E - 1, generator=generator).argsort(1)[:, :K]
    return chosen + (chosen >= 5)


def batch(sizes: list[int], choice: Choice, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    for tokens in sizes:
        x, grad = torch.randn(2, tokens, H, generator=generator).to(dtype)
        yield x, torch.rand(tokens, K, generator=generator), choice(tokens, generator), grad


@pytest.mark.parametrize("choice", [anyhow, first_rank_alone, never_five])
@pytest.mark.parametrize("sizes", [[5, 9], [0, 7], [0, 0], [4, 0, 6, 11]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [4.0, 1.5, 0.2])
def test_shared_experts_are_all_experts(sizes: list[int], choice: Choice, dtype: torch.dtype, most: float) -> None:
    parts = list(batch(sizes, choice, dtype))
    whole = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    expected = run(experts(dtype).float(), whole[0].float(), whole[1], whole[2], whole[3].float())
    group = Threads(len(sizes))
    made = [experts(dtype) for _ in sizes]
    for rank, one in enumerate(made):
        one.share(group.member(rank), most)
        assert {*one.elsewhere} | {name for name, _ in one.named_parameters()} == {*dict(experts().named_parameters())}
    with ThreadPoolExecutor(len(sizes)) as pool:
        results = list(pool.map(lambda job: run(job[0], *job[1]), zip(made, parts, strict=True)))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for name, reference in expected.items():
        found = torch.cat([r[name] for r in results if name in r])
        assert found.shape == reference.shape and found.dtype == (torch.float32 if name == "weights" else dtype)
        assert (found.float() - reference).norm() <= tolerance * max(1.0, reference.norm()), name
    if sum(sizes):
        check_travel(group, parts, sizes, most)


def check_travel(group: Threads, parts: list[tuple[Tensor, ...]], sizes: list[int], most: float) -> None:
    """A token goes once to a rank, whatever it has chosen there; in the backward once more, beside its gradient."""
    owner = E // len(sizes)
    received = [sum(int((c // owner == rank).any(1).sum()) for _, _, c, _ in parts) for rank in range(len(sizes))]
    bound = max(1, int(most * sum(sizes) / len(sizes)))
    for rank in range(len(sizes)):
        shapes = group.rows[rank]
        if max(received) > bound:  # each shard in pieces; one row more for each rank, since each cuts its own
            assert max(rows for rows, *width in shapes if width == [2, H]) <= bound + len(sizes)
            continue
        mine = sum(len(row.unique()) for row in parts[rank][2] // owner)
        _, told, tokens, outputs, both, of_weights, gradients = shapes
        assert (tokens, both) == ((received[rank], H), (received[rank], 2, H)) and told == (received[rank], 2 * K)
        assert (outputs, gradients, of_weights) == ((mine, H), (mine, H), (mine, K))


def test_rows_beyond_a_ranks_share_go_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    swiglu = module.swiglu

    def watched(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(gate))
        return swiglu(gate, up, weight)

    monkeypatch.setattr(module, "swiglu", watched)
    parts = list(batch([2, 30], lambda tokens, generator: torch.arange(K).expand(tokens, K), torch.float32))
    group, made = Threads(2), [experts(shard=4), experts(shard=4)]
    for rank, one in enumerate(made):
        one.share(group.member(rank), 2.0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: run(job[0], *job[1]), zip(made, parts, strict=True)))
    assert seen == [48, 48]  # of 32 tokens with 3 experts on the first rank, and none on the second


def test_what_is_received_is_released_before_the_rows_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    member, made = Threads(1).member(0), experts()
    exchange, sum_rows = member.exchange, channel.sum_rows

    def watched(rows: Tensor, sent: Sequence[int], sizes: Sequence[int]) -> Came:
        came = exchange(rows, sent, sizes)
        if came.rows.shape[-1] == H:
            received.append(weakref.ref(came.rows))
        return came

    def counted(*args: Any) -> Tensor:
        alive.append(sum(tensor() is not None for tensor in received))
        return sum_rows(*args)

    monkeypatch.setattr(member, "exchange", watched)
    monkeypatch.setattr(channel, "sum_rows", counted)
    made.share(member, 1.0)
    run(made, *next(batch([6], anyhow, torch.float32)))
    assert len(received) == 4 and alive[0] == 0  # tokens; then outputs, tokens with gradients, gradients
