"""A rehearsed rank calls the collectives that the job's rank 0 calls, in order and size, and holds what it holds."""

import functools
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from src.models.sft_module import SFTModule
from src.rehearsal.job import Job, Measured, Rows, rehearse
from src.rehearsal.loopback import join
from src.strategies import DeepSpeedSPStrategy
from tests.command import run, start_afresh
from tests.distributed.spawn import run_distributed
from tests.models.tiny import DEEPSEEK_V3
from tests.strategies.test_zero3_collectives import Calls as Operations

COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_to_all_single",
    "all_reduce",
    "broadcast",
)
SETTINGS: dict[str, Any] = {"from_scratch": True, "experts_per_shard": 2, "mtp_loss_weight": 0.0, "aux_loss_alpha": 0.1}


def recorded() -> list[tuple[str, tuple[int, ...], int]]:
    """Fills with each collective's name, sizes and group size from now on."""
    calls: list[tuple[str, tuple[int, ...], int]] = []

    def wrap(name: str) -> None:
        function = getattr(dist, name)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            sizes = tuple(a.numel() for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
            group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
            calls.append((name, sizes, dist.get_world_size(group)))
            return function(*args, **kwargs)

        setattr(dist, name, counted)

    for name in COLLECTIVES:
        wrap(name)
    return calls


def held(module: SFTModule) -> int:
    return sum(p.ds_tensor.numel() for p in module.parameters() if hasattr(p, "ds_tensor"))


class Even(SFTModule):
    """Every token's experts are 0, 4 and 5, whatever its affinities: ranks that share them get as many rows each."""

    def configure_model(self) -> None:
        super().configure_model()
        for name, bias in self.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias[[0, 4, 5]] = torch.tensor([30.0, 20.0, 10.0])


def module_for(ep: int, directory: str) -> SFTModule:
    return (Even if ep > 1 else SFTModule)(directory, **SETTINGS)


def trainer_arguments(sp: int, offload: bool, ep: int = 1) -> dict[str, Any]:
    strategy = DeepSpeedSPStrategy(
        sequence_parallel_size=sp, expert_parallel_size=ep, offload_optimizer=offload, offload_parameters=offload
    )
    return {"accelerator": "cpu", "precision": "32-true", "gradient_clip_val": 1.0, "strategy": strategy}


def real(job: Job, directory: str, offload: bool, ep: int) -> tuple[list[Any], int]:
    calls, module = recorded(), module_for(ep, directory)
    trainer = pl.Trainer(
        **trainer_arguments(job.sp, offload, ep),
        devices=job.world,
        max_steps=2,
        accumulate_grad_batches=job.accumulate,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(Rows(job), batch_size=None))
    return calls, held(module)


def rehearsed(job: Job, directory: str, offload: bool, ep: int) -> tuple[list[Any], int, Measured]:
    calls, module = recorded(), module_for(ep, directory)
    measured = rehearse(job, module, 2, [], **trainer_arguments(job.sp, offload, ep))
    return calls, held(module), measured


@pytest.mark.parametrize(("sp", "offload", "ep"), [(2, False, 1), (1, True, 1), (4, False, 2), (1, True, 2)])
def test_it_is_the_jobs_first_rank(sp: int, offload: bool, ep: int, directory: str) -> None:
    job = Job(world=4, sp=sp, batch_size=2, accumulate=2, rows=[[16, 8], [4], [10]], vocab=DEEPSEEK_V3["vocab_size"])
    calls, elements = run_distributed(real, 4, job, directory, offload, ep)[0]
    ours, ours_elements, measured = run_distributed(rehearsed, 1, job, directory, offload, ep)[0]
    assert ours_elements == elements > 0
    assert ours == calls and {"all_gather_into_tensor", "all_reduce"} <= {name for name, *_ in calls}
    assert [len(step) for step in measured.micro_steps] == [2] and len(measured.losses) == 2
    # Of an SP group's first rank alone: a part of the loss of random weights, ln(vocabulary).
    assert all(0 < loss < 1.2 * math.log(job.vocab) for loss in measured.losses)


class Count(pl.Callback):
    """Of the last step's first micro-step: operations that PyTorch dispatches, and Python functions that are called."""

    def __init__(self) -> None:
        self.operations, self.calls = Operations(), Counter[str]()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if (trainer.global_step, trainer.fit_loop.batch_idx % 2) == (1, 0):
            self.operations.__enter__()
            sys.setprofile(self._called)

    def on_train_batch_end(self, *_: Any) -> None:
        if sys.getprofile() is not None:
            sys.setprofile(None)
            self.operations.__exit__(None, None, None)

    def _called(self, frame: Any, event: str, _: Any) -> None:
        if event == "call":
            self.calls[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1


def counted(world: int, directory: str) -> tuple[Counter[str], Counter[str]]:
    # All experts of a layer in one shard: one without rows, of which these weights make some, is not computed.
    settings = SETTINGS | {"experts_per_shard": DEEPSEEK_V3["n_routed_experts"]}
    job = Job(world, sp=2, batch_size=1, accumulate=2, rows=[[16, 8]], vocab=DEEPSEEK_V3["vocab_size"])
    count = Count()
    rehearse(job, SFTModule(directory, **settings), 2, [count], **trainer_arguments(2, False))
    return count.operations.by_name, count.calls


def test_a_micro_step_costs_the_host_the_same_at_8_and_at_1024_ranks(directory: str) -> None:
    few, many = (run_distributed(counted, 1, world, directory)[0] for world in (8, 1024))
    # The end of a parameter that 8 ranks do not divide is laid out by itself; nothing else differs.
    ends = few[0] - many[0]
    assert many[0] - few[0] == Counter() and set(ends) <= {"aten.slice.Tensor", "aten.select.int", "aten.div.out"}
    assert ends.total() < 0.02 * many[0].total() and many[0].total() > 1000
    python = [Counter({name: n for name, n in calls.items() if "torch" not in name}) for _, calls in (few, many)]
    assert python[0] == python[1] and python[0].total() > 5000


def far(_: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    join(256)
    whole, part = torch.empty(256 * 300), torch.arange(300.0)
    dist.all_gather_into_tensor(whole, part, async_op=True).wait()
    numbers = torch.empty(256 * 300, dtype=torch.int64)
    dist.all_gather_into_tensor(numbers, torch.arange(300))
    own = torch.empty(300)
    dist.reduce_scatter_tensor(own, whole)
    objects = [0] * 256
    dist.all_gather_object(objects, 7)
    return whole.view(256, 300), numbers.view(256, 300), own, objects


def test_other_ranks_parts_are_its_own_moved_on() -> None:
    whole, numbers, own, objects = run_distributed(far, 1, 0)[0]
    part = torch.arange(300.0)
    assert all(torch.equal(whole[rank], part.roll(-rank)) for rank in range(256))
    assert all(torch.equal(row, torch.arange(300)) for row in numbers)
    assert torch.equal(own, part) and objects == [7] * 256


@pytest.mark.parametrize(
    ("rows", "length", "ep", "said"),
    [("full", 32, 1, "32 tokens"), ("spread", 32, 2, "4 to 32 tokens"), ("data", 256, 1, r"\d+ to 256 tokens")],
)
def test_the_command(rows: str, length: int, ep: int, said: str, tmp_path: Path) -> None:
    config = ["--config", "configs/tiny_cpu.yaml", "--trainer.default_root_dir", str(tmp_path / "run")]
    job = [
        "--trainer.num_nodes=128",
        "--trainer.accumulate_grad_batches=2",
        f"--data.max_length={length}",
        f"--rows={rows}",
        f"--trainer.strategy.expert_parallel_size={ep}",
    ]
    result = start_afresh("rehearse", *config, *job)
    shared = ", experts shared by 2" if ep == 2 else ""
    assert f"rank 0 of 256 (DP 128 x SP 2{shared}), everything but the network:" in result.stdout
    assert "of a node: computation waits" not in result.stderr
    for row in ("a micro-step, s", "the last and the optimizer, s", "host memory, GiB", "the busiest expert's load"):
        assert row in result.stdout
    assert "Gathers are copies at " in result.stdout
    assert re.search(rf"Rows of {said}; the plan's are of {length} tokens, all full", result.stdout)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_what_cannot_be_rehearsed_is_said() -> None:
    large, on_cpu = ["--config", "configs/32n_sp4.yaml"], ["--trainer.accelerator", "cpu", "--trainer.num_nodes", "8"]
    for args, message in (
        (large, "no GPU can be used here"),
        ([*large, *on_cpu], "GiB of host memory by the plan"),
    ):
        result = run("rehearse", *args, check=False)
        assert result.returncode == 2 and message in result.stderr
