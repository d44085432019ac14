"""Files mixed by weight: how often each conversation is in an epoch, what is refused, and resuming."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerFast

from src.datamodules import SFTDataModule, sft
from src.datamodules.mixture import Mixture, Part, check_weights, mix
from src.datamodules.packing import one_sample_a_row, pack
from src.datamodules.sampler import EMPTY_ROW, MicroBatchSampler

from .conftest import question_answer
from .test_sft import LateRestore, fit

Make = Callable[..., SFTDataModule]


def test_whole_parts_every_epoch_and_fractions_in_turn() -> None:
    mixture = Mixture((Part("a", 2.0, 3, 30, 10), Part("b", 0.25, 8, 80, 40), Part("c", 0, 5, 5, 5)))
    assert len(mixture) == 8
    epochs = [Counter(mixture.rows(epoch, seed=1).tolist()) for epoch in range(8)]
    for epoch in epochs:
        assert [epoch[row] for row in range(3)] == [2, 2, 2] and sum(epoch.values()) == 8
        assert all(row < 11 for row in epoch)  # none of weight 0
    # Four epochs of a quarter are every row once, and the next four again.
    for four in (epochs[:4], epochs[4:]):
        assert sum(four, Counter()) == Counter(dict.fromkeys(range(3), 8) | dict.fromkeys(range(3, 11), 1))
    assert mixture.rows(0, seed=1).tolist() != mixture.rows(0, seed=2).tolist()
    assert mixture.lines()[1] == ("0.25 x b", "2 rows per epoch, of 8; 20 tokens (25.0%), 10 trained (33.3%)")


def test_entries_are_packed_by_themselves_and_keep_their_samples() -> None:
    lengths = np.array([5, 5, 3, 9, 1, 2], dtype=np.int32)
    owners = [np.array([0, 3, 4]), np.array([1, 2, 5])]
    packed = []
    for samples in owners:
        rows = pack(lengths[samples], 10)
        packed.append(type(rows)(samples[rows.samples], rows.offsets))
    rows, mixture = mix(["a", "b"], [1.0, 1.0], packed, lengths, lengths)
    assert [sorted(rows[row].tolist()) for row in range(len(rows))] == [[3, 4], [0], [1, 2, 5]]
    assert [part.tokens for part in mixture.parts] == [15, 10] and len(mixture) == 3


@pytest.mark.parametrize("layout", [(1, 1, 8), (2, 2, 2), (8, 1, 1)])
def test_a_step_has_the_same_rows_and_targets_on_every_layout(layout: tuple[int, int, int]) -> None:
    dp, batch_size, accumulation = layout
    mixture = Mixture((Part("a", 1.5, 10, 1, 1), Part("b", 3, 4, 1, 1)))
    targets = np.arange(1, 15, dtype=np.int64)
    for epoch in (0, 3):
        ranks = []
        for rank in range(dp):
            sampler = MicroBatchSampler(targets, targets, targets, batch_size=batch_size, rank=rank, mixture=mixture,
                                        accumulate_grad_batches=accumulation, num_replicas=dp)  # fmt: skip
            sampler.set_epoch(epoch)
            ranks.append(list(sampler))
            assert len(ranks[-1]) == len(sampler) == 4 * accumulation
        order: list[int] = []
        for step in range(4):
            micros = [ranks[r][m] for m in range(step * accumulation, (step + 1) * accumulation) for r in range(dp)]
            rows = [row for micro in micros for row in micro.rows]
            taken = [row for row in rows if row != EMPTY_ROW]
            assert {micro.step_targets for micro in micros} == {int(targets[taken].sum())}
            order += taken
        assert Counter(order) == Counter(mixture.rows(epoch, 0).tolist()) and len(order) == 27
        one = MicroBatchSampler(targets, targets, targets, batch_size=27, mixture=mixture)
        one.set_epoch(epoch)
        assert list(next(iter(one)).rows) == order  # in the same order as on any other layout


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"data\.train_weights has 1 value, data\.train_files 2 entries; give one weight for each"),
        ([1.0, -0.5], r"data\.train_weights: -0\.5 for 'b'; a weight says how often .*: 0 \(not at all\) or more"),
        ([1.0, float("nan")], r"data\.train_weights: nan for 'b'"),
        ([0.0, 0.0], r"data\.train_weights are all 0: there is nothing to train on"),
    ],
)
def test_weights_that_are_none_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights(weights, ["a", "b"])
    with pytest.raises(ValueError, match=message):
        SFTDataModule(["a", "b"], train_weights=weights)


def test_a_weight_of_less_than_a_row_is_refused() -> None:
    lengths = np.ones(14, dtype=np.int32)
    packed = [one_sample_a_row(10), one_sample_a_row(4)]
    with pytest.raises(ValueError, match=r"0\.04 of the 10 packed rows of 'a' is not one row; raise it to 0\.1"):
        mix(["a", "b"], [0.04, 1], packed, lengths, lengths)


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(sft, "load_tokenizer", lambda spec: tokenizer)
    for name, count in (("a1", 2), ("a2", 1), ("b", 8)):
        rows = [{"messages": question_answer(f"{name}{row}?", "yes " * (row + 1))} for row in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def datamodule(files: tuple[str, ...] = ("a*.jsonl", "b.jsonl"), **options: Any) -> SFTDataModule:
        defaults: dict[str, Any] = {"max_length": 64, "packing": False, "num_workers": 0, "tokenizer": "deepseek",
                                    "train_weights": [2.0, 0.5]}  # fmt: skip
        entries = [f"{tmp_path}/{file}" for file in files]
        return SFTDataModule(entries, cache_dir=f"{tmp_path}/cache", **defaults | options)

    return datamodule


def test_conversations_of_a_run_and_resuming_on_another_layout(tmp_path: Path, make: Make) -> None:
    whole = fit(tmp_path / "whole", make(), save_every=1)
    assert whole.planned_steps == 10  # (3 x 2 + 8 / 2) / 2 an epoch
    seen = [Counter(name for record in whole.records if record[0] == epoch for name in record[2]) for epoch in (0, 1)]
    always = {"a1.jsonl:1": 2, "a1.jsonl:2": 2, "a2.jsonl:1": 2}
    for epoch in seen:
        assert {name: count for name, count in epoch.items() if name in always} == always
        assert sum(epoch.values()) == 10
    assert seen[0] + seen[1] == Counter(
        {name: 4 for name in always} | {f"b.jsonl:{row}": 1 for row in range(1, 9)}  # two halves, one after the other
    )
    for done in (3, 7):
        checkpoint = tmp_path / f"whole/step={done}.ckpt"
        resumed = fit(tmp_path / "other", make(batch_size=2), checkpoint, accumulate_grad_batches=1)
        steps = {step: [n for r in whole.records if r[1] == step for n in r[2]] for step in range(done, 10)}
        assert {step: [n for r in resumed.records if r[1] == step for n in r[2]] for step in range(done, 10)} == steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_weights": [2.0, 1.0]}, r"set --data\.train_weights \[2\.0, 0\.5\]"),
        ({"train_weights": None}, r"data\.train_weights is None, but the checkpoint was trained with \[2\.0, 0\.5\]"),
        # The same files, but another of them twice.
        ({"files": ("a1.jsonl", "?[!1]*jsonl")}, r"not the checkpoint's: 11 rows .* the entries of train_files too"),
    ],
)
def test_another_mixture_is_not_continued(tmp_path: Path, make: Make, change: dict[str, Any], message: str) -> None:
    fit(tmp_path, make(), max_steps=2)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make(**change), tmp_path / "end.ckpt")


@pytest.mark.parametrize("weights", [{}, {"train_weights": None}])
def test_a_file_of_two_entries_is_refused(weights: dict[str, Any], tmp_path: Path, make: Make) -> None:
    with pytest.raises(ValueError, match=r"a1\.jsonl' is the same file as '.*a1\.jsonl' \(matched by '.*a\*\.jsonl'\)"):
        make(("a*.jsonl", "a1.jsonl"), **weights).setup("fit")


def test_named_validation_sets(tmp_path: Path, make: Make) -> None:
    sets = {"b": [f"{tmp_path}/b.jsonl"], "a": [f"{tmp_path}/a*.jsonl"]}
    data = make(val_sets=sets, batch_size=3)
    data.trainer = Trainer(strategy=LateRestore(), logger=False, enable_checkpointing=False)
    data.setup("validate")
    assert data.train_set is None
    seen = [(batch["val_set"], len(batch["sources"])) for loader in data.val_dataloader() for batch in loader]
    assert seen == [("b", 3), ("b", 3), ("b", 2), ("a", 3)]
    assert data.facts().keys() == {"val b", "val a"} and data.facts()["val a"]["rows"] == 3
    with pytest.raises(ValueError, match=r"val_sets: 'a/b' is not a valid name for a set; use letters"):
        make(val_sets={"a/b": []})


def test_what_is_recorded_of_the_data(make: Make) -> None:
    mixed, plain = make(), make(train_weights=None)
    for data in (mixed, plain):
        data.setup("fit")
    facts = mixed.facts()["train"]
    parts = [(entry.rsplit("/", 1)[1], amounts) for entry, amounts in facts["mixture"].items()]
    assert parts == [("a*.jsonl", {"weight": 2.0, "rows": 3, "rows_an_epoch": 6}),
                     ("b.jsonl", {"weight": 0.5, "rows": 8, "rows_an_epoch": 4})]  # fmt: skip
    assert mixed.train_set is not None and plain.train_set is not None
    assert plain.facts()["train"]["hash"] == plain.train_set.cache.fingerprint == mixed.train_set.cache.fingerprint
    assert facts["hash"] != plain.train_set.cache.fingerprint and "mixture" not in plain.facts()["train"]
