"""An out-of-memory error says where it happened and what would change it."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.callbacks.out_of_memory import OutOfMemory, plan_command, remedies
from tests.test_pages import pasted

from .stub import Stub, train

ARGUMENTS = ["--config", "configs/32n_sp4.yaml", "--data.train_files=[a b.jsonl]"]


class Full(Stub):
    """Its third forward does not fit."""

    layer_input, attention_output, activation_checkpointing = "keep", "recompute", True

    def __init__(self) -> None:
        super().__init__()
        self.model.kept_bytes = {"layer_input": 4096, "attention_output": 7000}  # Moonlight's

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().training_step(batch, batch_idx)


def test_it_says_where_and_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["src/cli.py", "fit", *ARGUMENTS])
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 GiB") as caught:
        train(Full(), OutOfMemory())
    (note,) = caught.value.__notes__
    lines = note.splitlines()
    assert lines[0].startswith("Rank 0 ran out of GPU memory in step 2, phase forward: ")
    assert "of host memory available" in lines[0]
    assert "  --model.layer_input=offload  (now keep): 4 KiB per token and layer to host memory" in lines
    assert lines[-1] == (
        "  python -m src.cli plan --config configs/32n_sp4.yaml '--data.train_files=[a b.jsonl]' "
        "--model.layer_input=offload"
    )


def test_another_error_is_left_as_it_is() -> None:
    class Broken(Stub):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            raise ValueError("no")

    with pytest.raises(ValueError) as caught:
        train(Broken(), OutOfMemory())
    assert not hasattr(caught.value, "__notes__")


def module(**settings: Any) -> Any:
    experts = torch.nn.Module()
    experts.mlp = torch.nn.Module()
    experts.mlp.experts = torch.nn.Module()
    experts.mlp.experts.experts_per_shard = 32  # type: ignore[assignment]
    config = SimpleNamespace(num_attention_heads=128)
    return SimpleNamespace(config=config, named_modules=experts.named_modules, **settings)


def test_remedies_come_by_cost_and_are_of_what_can_change() -> None:
    strategy = SimpleNamespace(offloads_optimizer=False, sequence_parallel_size=4)
    trainer: Any = SimpleNamespace(strategy=strategy, datamodule=SimpleNamespace(batch_size=2), world_size=256)
    found = remedies(trainer, module(layer_input="keep", attention_output="keep", activation_checkpointing=True))
    assert [(s.option.rpartition(".")[2], s.now, s.less) for s in found] == [
        ("layer_input", "keep", "offload"),
        ("attention_output", "keep", "offload"),
        ("offload_optimizer", "false", "true"),
        ("sequence_parallel_size", 4, 8),
        ("batch_size", 2, 1),
        ("experts_per_shard", 32, 16),
    ]
    strategy.offloads_optimizer, trainer.datamodule.batch_size, trainer.world_size = True, 1, 4
    strategy.reduce_dtype = "bf16"
    found = remedies(trainer, module(layer_input="offload", attention_output="offload", activation_checkpointing=True))
    assert [(s.option, s.less) for s in found] == [
        ("--model.experts_per_shard", 16),
        ("--trainer.strategy.init_args.reduce_dtype", "fp32"),
    ]


@pytest.mark.parametrize(("ep", "node", "less"), [(8, 8, 4), (2, 8, 1), (24, 8, 8), (16, 8, 8), (6, 6, 3)])
def test_fewer_ranks_share_experts_of_which_tokens_arrive(ep: int, node: int, less: int) -> None:
    strategy = SimpleNamespace(offloads_optimizer=True, expert_parallel_size=ep)
    trainer: Any = SimpleNamespace(strategy=strategy, num_devices=node, world_size=48)
    found = remedies(trainer, module(layer_input="offload", attention_output="offload"))
    assert [(s.option.rpartition(".")[2], s.less) for s in found] == [
        ("experts_per_shard", 16),
        ("expert_parallel_size", less),
    ]


def test_the_page_has_the_same_words() -> None:
    strategy = SimpleNamespace(offloads_optimizer=True, sequence_parallel_size=4)
    trainer: Any = SimpleNamespace(strategy=strategy, datamodule=SimpleNamespace(batch_size=2), world_size=256)
    model = SimpleNamespace(kept_bytes={"layer_input": 2 * 7168})
    kept = module(layer_input="keep", attention_output="recompute", activation_checkpointing=True, model=model)
    changes = remedies(trainer, kept)
    page = pasted("docs/watching.md", "torch.OutOfMemoryError").splitlines()
    assert [f"  {s.option}={s.less}  (now {s.now}): {s.cost}" for s in changes] == page[3:-3]
    assert page[-1] == "  " + plan_command(["--config", "configs/32n_sp4.yaml"], changes[:1])
