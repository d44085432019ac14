"""What an export says that its dtype keeps, against plain arithmetic on whole tensors; and which scales FP8 takes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.callbacks.export_at_end import ExportAtEnd
from src.callbacks.run_record import RunRecord
from src.callbacks.step_checkpoint import StepCheckpoint
from src.commands.export import export
from src.weights import output
from src.weights.fp8 import is_quantised, quantise, quantise_change
from tests.checkpoints.test_export import masters
from tests.checkpoints.tiny import dequantise_whole, dequantised, stored
from tests.checkpoints.workers import Checkpoints
from tests.distributed.spawn import run_distributed
from tests.distributed.training import Layout, Recipe, fit
from tests.test_pages import pasted, shape

LAYOUT = Layout(dp=2, sp=1, accumulation=1, batch_size=1, precision="bf16-true")
LIVE = "live"


def train(directory: str, root: str) -> None:
    """A step of 2e-5, from weights of some 0.05: half a step of FP8 is 100 times as much, of BF16 as much."""
    callbacks = (
        StepCheckpoint(every_n_train_steps=0),
        RunRecord("model: {from_scratch: false}", directory, None),
        ExportAtEnd(f"{root}/{LIVE}", "fp8", "100KB"),
    )
    recipe = Recipe(learning_rate=2e-5, steps=1, weight_decay=0.0, mtp_loss_weight=0.1, router_bias_update_speed=1.0)
    fit(LAYOUT, recipe, directory, 8, root, more_callbacks=callbacks)


@pytest.fixture(scope="module")
def trained(fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_distributed(train, 2, str(fp8), str(folder))
    return folder


def figures(rounded: dict[str, Tensor], before: dict[str, Tensor], pairs: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """By group of weights, in per cent to a tenth: kept and error."""
    found = {}
    for group, pattern in (
        ("whole", ""),
        ("experts", r"mlp\.experts\."),
        ("attention", "self_attn"),
        ("the rest", r"^(?!.*(mlp\.experts|self_attn))"),
    ):
        names = [name for name in pairs if re.search(pattern, name)]
        change = torch.cat([(pairs[name][0] - pairs[name][1]).double().flatten() for name in names])
        left = torch.cat([(rounded[name] - before[name]).double().flatten() for name in names])
        found[group] = (float(left @ change / (change @ change)), float((left - change).norm() / change.norm()))
    return found


def read_table(text: str) -> dict[str, tuple[float, float]]:
    rows = re.findall(r"^\| (whole|experts|attention|the rest) \| ([-\d.]+)% \| ([\d.]+)% \|$", text, re.MULTILINE)
    return {group: (float(kept) / 100, float(error) / 100) for group, kept, error in rows}


@pytest.mark.parametrize(("dtype", "chunk"), [("bf16", 5000), ("fp8", 1), ("fp8", 1 << 22)])
def test_the_table_is_that_of_whole_tensors(
    trained: Path,
    fp8: Path,
    tmp_path: Path,
    dtype: Any,
    chunk: int,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = output.chunks
    monkeypatch.setattr(output, "CHUNK", chunk)
    monkeypatch.setattr(output, "chunks", lambda start, stop, step=5000: whole(start, stop, step))
    checkpoint = trained / "checkpoints/last.ckpt"
    export(str(checkpoint), str(tmp_path / "out"), dtype, "100KB")
    after, base = masters(checkpoint), dequantised(stored(fp8))
    written = dequantised(stored(tmp_path / "out"))
    pairs = {name: (after[name], base[name].float()) for name in base if name in after and "bias" not in name}
    before = {
        name: base[name] if dtype == "fp8" and is_quantised(name) else base[name].bfloat16().float() for name in pairs
    }
    expected = figures({name: written[name].float() for name in pairs}, before, pairs)
    for text in (capsys.readouterr().out, (tmp_path / "out/README.md").read_text()):
        assert set(shape(pasted("docs/rounding.md", "| weights"))) <= set(shape(text))
        found = read_table(text)
        assert found.keys() == expected.keys()
        for group in expected:
            assert found[group] == pytest.approx(expected[group], abs=6e-4), group
    assert not list((tmp_path / "out").glob(".*"))
    if dtype == "fp8":
        assert expected["whole"][0] < 0.5
        assert re.search(r"fp8 keeps \d+\.\d % of what training changed.*: bf16 keeps it, --dtype bf16", caplog.text)
    else:
        assert expected["whole"][0] > 0.9 and "keeps" not in caplog.text


def test_the_export_at_the_end_of_fit_is_the_commands(trained: Path, tmp_path: Path) -> None:
    export(str(trained / "checkpoints/last.ckpt"), str(tmp_path / "out"), "fp8", "100KB")
    live, expected = (
        {file.name: file.read_bytes() for file in folder.iterdir()} for folder in (trained / LIVE, tmp_path / "out")
    )
    assert live == expected and read_table(live["README.md"].decode())


def test_processes_that_share_the_files_say_it_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(trained / "checkpoints/last.ckpt")
    export(checkpoint, str(tmp_path / "alone"), "bf16", "100KB")
    alone = capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        assert not capsys.readouterr().out
        monkeypatch.setenv("RANK", str(rank))
        export(checkpoint, str(tmp_path / "shared"), "bf16", "100KB")
    assert read_table(capsys.readouterr().out) == read_table(alone) != {}
    assert (tmp_path / "shared/README.md").read_text() == (tmp_path / "alone/README.md").read_text()


def test_without_the_base_it_says_that_it_is_not_measured(
    checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = str(checkpoints.folder / "stage 3")
    export(checkpoint, str(tmp_path / "a"))
    assert "not measured: the checkpoint does not record what it started from; give --base" in caplog.text
    assert "Not measured" in (tmp_path / "a/README.md").read_text()
    export(checkpoint, str(tmp_path / "b"), "fp32")
    assert "rounding leaves" not in (tmp_path / "b/README.md").read_text()


def test_fp8_scales_are_the_bases_where_little_has_moved_and_their_own_where_much_has() -> None:
    torch.manual_seed(0)
    codes, scale = quantise(torch.randn(300, 257) * 0.02)
    base = dequantise_whole(codes, scale)
    weight = base.clone()
    assert torch.equal(quantise_change(weight, base, scale)[0].view(torch.uint8), codes.view(torch.uint8))
    weight[:128, :128] += 1e-6 * torch.randn(128, 128)
    weight.view(-1)[weight[:128, :128].abs().argmax() // 128 * 257 + weight[:128, :128].abs().argmax() % 128] *= 1.001
    weight[128:256, :128] *= 3
    values, chosen, left = quantise_change(weight, base, scale)
    assert torch.equal(left, dequantise_whole(values, chosen) - base)
    own = quantise(weight)[1]
    assert chosen[0, 0] == scale[0, 0] != own[0, 0]
    assert chosen[1, 0] == own[1, 0] > 2 * scale[1, 0]
    for scales in (scale, own):
        other = dequantise_whole(*quantise(weight, scales)) - base
        assert (left - (weight - base)).norm() <= (other - (weight - base)).norm()


def test_a_bf16_base_has_the_scales_of_its_own_quantisation() -> None:
    torch.manual_seed(0)
    base = (torch.randn(130, 140) * 0.02).bfloat16().float()
    values, scale, left = quantise_change(base, base)
    expected, scales = quantise(base)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scale, scales)
    assert not left.any()
