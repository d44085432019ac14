import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers import PreTrainedTokenizerFast

from src.datamodules import SFTDataModule, sft

from .conftest import question_answer

ROWS = 11
Record = tuple[int, int, tuple[str, ...], int]


class LateRestore(SingleDeviceStrategy):
    """Restores checkpoints after `setup`, as DeepSpeedStrategy does."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


class Recorder(LightningModule):
    """Records (epoch, optimizer step, rows, N) of every micro-batch, and stops or fails where it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at = fail_at
        self.records: list[Record] = []
        self.epochs_begun: list[int] = []
        self.validated: list[str] = []
        self.planned_steps: float = 0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == self.fail_at:
            raise KeyboardInterrupt
        names = tuple(source.rsplit("/", 1)[1] for source in batch["sources"])
        self.records.append((self.trainer.current_epoch, self.trainer.global_step, names, batch["step_targets"]))
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated += batch["sources"]

    def on_train_epoch_start(self) -> None:
        self.epochs_begun.append(self.trainer.current_epoch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trainer.datamodule.restore_progress(checkpoint)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.planned_steps = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for the data and its cache, so that each test need not tokenise again."""
    root = tmp_path_factory.mktemp("sft")
    conversations = [question_answer(f"{number}?", "yes " * number) for number in range(1, ROWS + 1)]
    for name, messages in (("train", conversations), ("val", conversations[:3])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in messages))
    return root


@pytest.fixture
def make(
    root: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SFTDataModule]:
    monkeypatch.setattr(sft, "load_tokenizer", lambda spec: tokenizer)

    def datamodule(**options: Any) -> SFTDataModule:
        defaults: dict[str, Any] = {"max_length": 64, "packing": False, "num_workers": 0, "tokenizer": "deepseek"}
        defaults |= {"train_files": [str(root / "train.jsonl")], "cache_dir": str(root / "cache")}
        return SFTDataModule(**defaults | options)

    return datamodule


def fit(
    root: Path,
    datamodule: SFTDataModule,
    ckpt_path: Path | None = None,
    fail_at: int | None = None,
    save_every: int | None = None,
    **options: Any,
) -> Recorder:
    module = Recorder(fail_at)
    callbacks = [ModelCheckpoint(root, "step={step}", every_n_train_steps=save_every, save_top_k=-1,
                                 auto_insert_metric_name=False)] if save_every else []  # fmt: skip
    trainer = Trainer(
        strategy=LateRestore(),
        callbacks=callbacks,  # type: ignore[arg-type]
        default_root_dir=root,
        logger=False,
        enable_checkpointing=bool(save_every),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "accumulate_grad_batches": 2, **options},
    )
    if fail_at is None:
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=False)
        trainer.save_checkpoint(root / "end.ckpt")
    else:
        with pytest.raises(SystemExit):  # how Lightning ends after a KeyboardInterrupt
            trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=False)
    return module


def test_an_epoch_has_every_row_once_with_the_steps_targets(tmp_path: Path, make: Callable[..., SFTDataModule]) -> None:
    module = fit(tmp_path, make(), max_epochs=2)
    assert module.planned_steps == 12 and len(module.records) == 24
    for epoch in (0, 1):
        names = [name for record in module.records if record[0] == epoch for name in record[2]]
        assert sorted(names) == sorted(f"train.jsonl:{row}" for row in range(1, ROWS + 1))
    answers = {f"train.jsonl:{row}": row for row in range(1, ROWS + 1)}
    for step in range(12):
        records = [record for record in module.records if record[1] == step]
        rows = [answers[name] for record in records for name in record[2]]
        (targets,) = {record[3] for record in records}
        assert sum(rows) <= targets <= sum(rows) + 2 * len(rows)  # " yes" a word, and the end of turn
    assert module.records[11][2] == ()  # the empty row that fills up the first epoch's last step


# Where a run ended, and how it is told to go on: (optimizer steps done, how it stopped, options of the second run).
ENDS = [
    pytest.param(4, "killed", {"max_epochs": 2}, id="killed in the first epoch"),
    pytest.param(9, "killed", {"max_epochs": 2}, id="killed in the second epoch"),
    pytest.param(6, "killed", {"max_epochs": 2}, id="killed right after an epoch"),
    pytest.param(4, "killed", {"max_epochs": -1, "max_steps": 12}, id="by steps, in the first epoch"),
    pytest.param(6, "killed", {"max_epochs": -1, "max_steps": 12}, id="by steps, right after an epoch"),
    pytest.param(4, "max_steps", {"max_epochs": 2}, id="stopped by max_steps in the first epoch"),
    pytest.param(10, "max_steps", {"max_epochs": 2}, id="stopped by max_steps in the second epoch"),
    pytest.param(6, "max_steps", {"max_epochs": 2}, id="stopped by max_steps after an epoch"),
    pytest.param(4, "max_steps", {"max_epochs": -1, "max_steps": 12}, id="max_steps raised"),
    pytest.param(6, "max_steps", {"max_epochs": -1, "max_steps": 12}, id="max_steps raised after an epoch"),
    pytest.param(6, "max_epochs", {"max_epochs": 2}, id="max_epochs raised"),
]


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, tuple[Path, Recorder]]:
    """Runs that were never interrupted, with a checkpoint of every step: what one killed there leaves too."""
    return {}


@pytest.mark.parametrize(("done", "how", "options"), ENDS)
@pytest.mark.parametrize("layout", [{}, {"accumulate_grad_batches": 1}], ids=["same layout", "other layout"])
def test_resume_goes_on_with_the_very_next_rows(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make: Callable[..., SFTDataModule],
    whole_runs: dict[str, tuple[Path, Recorder]],
    done: int,
    how: str,
    options: dict[str, Any],
    layout: dict[str, Any],
) -> None:
    def uninterrupted(layout: dict[str, Any]) -> tuple[Path, Recorder]:
        name = f"{options}{layout}"
        if name not in whole_runs:
            where = tmp_path_factory.mktemp("whole")
            datamodule = make(batch_size=2 // layout.get("accumulate_grad_batches", 2))
            whole_runs[name] = where, fit(where, datamodule, save_every=1, **options, **layout)
        return whole_runs[name]

    _, whole = uninterrupted(layout)
    if how == "killed":
        checkpoint = uninterrupted({})[0] / f"step={done}.ckpt"
    else:
        stop: dict[str, Any] = {"max_steps": done} if how == "max_steps" else {"max_epochs": 1}
        fit(tmp_path, make(), **stop)
        checkpoint = tmp_path / "end.ckpt"
    batch_size = 2 // layout.get("accumulate_grad_batches", 2)
    resumed = fit(tmp_path, make(batch_size=batch_size), checkpoint, save_every=1, **options, **layout)
    assert resumed.records == [record for record in whole.records if record[1] >= done]
    assert resumed.epochs_begun == [epoch for epoch in (0, 1) if 6 * epoch >= done]
    assert resumed.trainer.current_epoch == whole.trainer.current_epoch
    # And once more, from what the resumed run saved.
    again = fit(tmp_path, make(), tmp_path / f"step={done + 1}.ckpt", **options)
    steps = {step: {name for record in whole.records if record[1] == step for name in record[2]} for step in range(12)}
    assert {record[1] for record in again.records} == set(range(done + 1, 12))
    for step in range(done + 1, 12):
        assert {name for record in again.records if record[1] == step for name in record[2]} == steps[step]


def test_resume_with_workers_that_prefetch(tmp_path: Path, make: Callable[..., SFTDataModule]) -> None:
    whole = fit(tmp_path / "whole", make(num_workers=2))
    fit(tmp_path, make(num_workers=2), fail_at=8, save_every=1)
    resumed = fit(tmp_path, make(num_workers=2), tmp_path / "step=8.ckpt")
    assert whole.records[:16] + resumed.records == whole.records
    assert whole.records == fit(tmp_path, make(num_workers=0)).records


def test_a_checkpoint_within_a_step_repeats_that_step(tmp_path: Path, make: Callable[..., SFTDataModule]) -> None:
    """Its first micro-batch's gradient is not in the checkpoint."""
    whole = fit(tmp_path / "whole", make())
    datamodule = make()

    class SaveWithinStep(Recorder):
        def on_train_batch_end(self, *_: Any) -> None:
            if len(self.records) == 7:
                self.trainer.save_checkpoint(tmp_path / "within.ckpt")

    trainer = Trainer(strategy=LateRestore(), logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, max_epochs=1, accumulate_grad_batches=2)  # fmt: skip
    trainer.fit(SaveWithinStep(), datamodule=datamodule)
    assert fit(tmp_path, make(), tmp_path / "within.ckpt").records == whole.records[6:]


def test_validation_sees_every_row_once_also_while_resuming(
    tmp_path: Path, root: Path, make: Callable[..., SFTDataModule]
) -> None:
    expected = [f"{root}/val.jsonl:{row}" for row in (1, 2, 3)]
    options: dict[str, Any] = {"val_files": [f"{root}/val.jsonl"], "batch_size": 2}
    module = fit(tmp_path, make(**options), save_every=1, num_sanity_val_steps=0, accumulate_grad_batches=1)
    assert module.validated == expected * 2
    datamodule = make(**options)
    resumed = fit(tmp_path, datamodule, tmp_path / "step=4.ckpt", accumulate_grad_batches=1)
    assert resumed.validated == expected * 2
    (loader,) = datamodule.val_dataloader()
    (first, second) = [loader.dataset[micro] for micro in loader.sampler]
    assert first["sources"] + second["sources"] == expected
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    trainer.validate(module := Recorder(), datamodule=make(**options), ckpt_path=tmp_path / "step=4.ckpt",
                     weights_only=False, verbose=False)  # fmt: skip
    assert module.validated == expected


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        (
            {"max_length": 63},
            {},
            r"data\.max_length is 63, but the checkpoint was trained with 64.*set --data\.max_length 64",
        ),
        ({"packing": True}, {}, r"data\.packing is True, but .* False"),
        ({"seed": 5}, {}, r"data\.seed is 5, but the checkpoint was trained with 0"),
        ({"history_reasoning": "strip"}, {}, r"the training data is not the checkpoint's: 11 rows"),
        (
            {"batch_size": 2},
            {},
            r"takes 4 rows \(data-parallel size 1 x batch_size 2 x accumulate_grad_batches 2\), but the checkpoint's "
            r"took 2; set --trainer\.accumulate_grad_batches 1$",
        ),
        ({"batch_size": 3}, {}, r"no accumulation gives 2: data-parallel size x batch_size must divide it"),
        ({}, {"limit_train_batches": 4}, r"an epoch has 2 optimizer steps, but the checkpoint's had 6"),
    ],
)
def test_a_checkpoint_of_other_data_or_steps_is_refused(
    tmp_path: Path, make: Callable[..., SFTDataModule], change: dict[str, Any], layout: dict[str, Any], message: str
) -> None:
    fit(tmp_path, make(), max_steps=2)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make(**change), tmp_path / "end.ckpt", **layout)


def test_a_module_that_does_not_restore_progress_is_refused(
    tmp_path: Path, make: Callable[..., SFTDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, make(), max_steps=2)
    monkeypatch.delattr(Recorder, "on_load_checkpoint")
    with pytest.raises(RuntimeError, match=r"on_load_checkpoint must call datamodule\.restore_progress"):
        fit(tmp_path, make(), tmp_path / "end.ckpt")


def test_limits_must_not_cut_a_step(tmp_path: Path, make: Callable[..., SFTDataModule]) -> None:
    assert len(fit(tmp_path, make(), limit_train_batches=4, max_epochs=2).records) == 8
    with pytest.raises(ValueError, match=r"limit_train_batches 3 .*must give a multiple of accumulate_grad_batches 2"):
        fit(tmp_path, make(), limit_train_batches=3)
    with pytest.raises(ValueError, match=r"overfit_batches replaces the sampler.*limit_train_batches 2"):
        fit(tmp_path, make(), overfit_batches=2)


def test_data_parallel_and_sequence_parallel_ranks(
    make: Callable[..., SFTDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strategy says who is who: two DP ranks, two SP ranks each, read one step's rows between them."""

    class Group:
        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

    batches: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for dp_rank in (0, 1):
        for sp_rank in (0, 1):
            strategy = LateRestore()
            strategy.sp_group = Group(sp_rank)  # type: ignore[attr-defined]
            trainer = Trainer(strategy=strategy, logger=False, enable_checkpointing=False, accumulate_grad_batches=3)
            kwargs = {"num_replicas": 2, "rank": dp_rank}
            monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", kwargs)
            datamodule = make(max_length=64, packing=True)
            datamodule.trainer = trainer
            datamodule.setup("fit")
            batches[dp_rank, sp_rank] = list(datamodule.train_dataloader())
    for dp_rank in (0, 1):
        for left, right in zip(batches[dp_rank, 0], batches[dp_rank, 1], strict=True):
            assert left["sources"] == right["sources"] and torch.equal(left["cu_seqlens"], right["cu_seqlens"])
            assert len(left["input_ids"]) * 2 == left["cu_seqlens"][-1]
    sources = [batch["sources"] for rank in (0, 1) for batch in batches[rank, 0]]
    assert sorted(sum(sources, [])) == sorted(set(sum(sources, []))) and len(sum(sources, [])) == ROWS
    labels = sum(int((batch["labels"] != -100).sum()) for ranks in batches.values() for batch in ranks)
    mtp_labels = sum(int((batch["mtp_labels"] != -100).sum()) for ranks in batches.values() for batch in ranks)
    first = batches[0, 0]
    assert labels == sum(batch["step_targets"] for batch in first[::3])
    assert mtp_labels == sum(batch["step_mtp_targets"] for batch in first[::3])


def test_what_is_missing_is_named(make: Callable[..., SFTDataModule]) -> None:
    with pytest.raises(
        ValueError, match=r"no tokenizer: give --data\.tokenizer DIR, 'deepseek', or --model\.pretrained"
    ):
        make(tokenizer=None).setup("fit")
    with pytest.raises(ValueError, match=r"nothing to validate on: give --data\.val_files"):
        make().setup("validate")
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        make(batch_size=0)


def test_the_first_rank_reads_the_files_and_the_others_open_what_it_names(
    make: Callable[..., SFTDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests are of all bytes; once is enough, and all ranks train on the same."""
    told: list[str] = []

    def trainer(first: bool) -> Any:
        def broadcast(value: str) -> str:
            if first:
                told.append(value)
            return told[-1]

        strategy = SimpleNamespace(broadcast=broadcast)
        alone = {"accumulate_grad_batches": 1, "distributed_sampler_kwargs": None}
        alone |= {"fast_dev_run": False, "overfit_batches": 0}
        return SimpleNamespace(is_global_zero=first, strategy=strategy, **alone)

    first, other = make(val_files=None), make(val_files=None)
    first.trainer, other.trainer = trainer(True), trainer(False)
    first.setup("fit")
    monkeypatch.setattr(sft, "open_or_build", lambda *args: pytest.fail("read the files"))
    other.setup("fit")
    assert first.train_set is not None and other.train_set is not None
    assert first.train_set.fingerprint == other.train_set.fingerprint == told[0]
    told.append("another")  # the first rank's files are others than those here
    with pytest.raises(ValueError, match=r"has no .*/another, .*must be the same files on every node"):
        late = make(val_files=None)
        late.trainer = other.trainer
        late.setup("fit")


def test_what_is_suspicious_is_said_once_with_its_count(
    tmp_path: Path, make: Callable[..., SFTDataModule], recwarn: pytest.WarningsRecorder
) -> None:
    silent = [{"messages": question_answer("q", ""), "source": "web"} for _ in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in silent))
    path = f"{tmp_path}/a.jsonl"
    data = make(train_files=[path], val_files=[path], val_sets={"more": [path]})
    data.check_command = "check these"
    data.setup("fit")
    (said,) = (str(warning.message) for warning in recwarn if "suspicious" in str(warning.message))
    heading, *lines, last = said.splitlines()
    assert (heading, last) == ("the data:", "  to list the rows: check these")
    what = {
        "messages[1].content: has no answer": (3, 1, 3),
        "source: is not read": (3, 1, 3),
        f"trains on the same tokens as {path}:1; remove one": (2, 2, 3),
        f"trains on the same tokens as {path}:1; the validation loss": (3, 1, 2),
    }
    assert len(lines) == sum(sets for *_, sets in what.values())
    for text, (count, row, sets) in what.items():
        found = [line for line in lines if text in line]
        assert [line.split(": ")[0].strip() for line in found] == ["train", "val", "val more"][-sets:]
        assert all(f": suspicious, {count} times, first {path}:{row}: " in line for line in found)
    recwarn.clear()
    make(train_files=[path], val_files=[path]).setup("validate")  # which has no training data to compare with
    (said,) = (str(warning.message) for warning in recwarn if "suspicious" in str(warning.message))
    assert len(said.splitlines()) == 5
