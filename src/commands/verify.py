"""Compares our model with transformers' on the same weights: `verify --model DIR [--layout-only]`."""

import math
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers import DeepseekV3ForCausalLM as OracleModel

from src.commands.opening import opening
from src.errors import UserError
from src.models.deepseek_v3 import DeepseekV3ForCausalLM, load_config
from src.models.loss import IGNORE_INDEX
from src.units import GIB
from src.weights.hf_reader import HFDirectorySource
from src.weights.key_map import hf_shapes, mtp_layer
from src.weights.layout import Layout, check_layout
from src.weights.load import load
from src.weights.side_files import read_config, transformers_knows
from src.weights.source import raise_listed

# Norm of the difference over the norm, in fp32: only the order of sums differs.
LIMITS = {"logits": 1e-4, "loss": 1e-5, "gradients": 1e-3}
LENGTHS = (61, 1, 34)  # tokens of the documents compared: one alone, and bounds that are multiples of nothing


def verify(model: str, layout_only: bool = False) -> None:
    """Compares logits, loss and every gradient with transformers' DeepseekV3ForCausalLM, in fp32 on the CPU.

    Both ways the directory is opened by transformers' Auto classes too, without code that lies in it.

    Args:
        model: Hugging Face directory of a DeepSeek-V3 model, BF16, FP32 or FP8.
        layout_only: compare the directory with the layout of the published weights instead: names, shapes and dtypes
            of all tensors, file sizes, index, config.json, tokenizer files. Headers alone are read, so that it takes
            seconds for any size.

    Raises:
        ValueError: the directory is not one, asks for what is not implemented, is not opened by transformers as it is
            trained, does not fit in memory twice with its gradients, or (layout_only) has another layout; all that is
            wrong is listed.
        SystemExit: they disagree.
    """
    config = load_config(model, "--model")
    problems, remarks = opening(model)
    if layout_only:
        layout = check_layout(model, problems)
        _print_layout(model, layout)
        _print_remarks([*layout.remarks, *remarks])
        return
    raise_listed(f"{model}: transformers does not open it as it is trained:", problems)
    _check_memory(config)
    ours = DeepseekV3ForCausalLM(config)
    source = HFDirectorySource(model)
    load(ours, source, num_hidden_layers=config.num_hidden_layers)
    theirs = _oracle(model, config, source)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (sum(LENGTHS),), generator=generator)
    labels = torch.randint(config.vocab_size, (sum(LENGTHS),), generator=generator)
    labels[::3] = IGNORE_INDEX
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()

    expected = torch.cat([theirs(document[None]).logits[0] for document in ids.split(list(LENGTHS))])
    expected_loss = torch.nn.functional.cross_entropy(expected, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    expected_loss.backward()
    with torch.no_grad():
        logits = ours.logits(ids, cu_seqlens, max(LENGTHS))
    loss = ours(ids, labels, cu_seqlens, max(LENGTHS)).loss
    loss.backward()

    gradients = _gradient_differences(ours, theirs)
    worst = max(gradients, key=lambda name: math.inf if math.isnan(gradients[name]) else gradients[name])
    differences = {
        "logits": _relative(logits, expected.detach()),
        "loss": abs(loss.item() / expected_loss.item() - 1),
        "gradients": gradients[worst],
    }
    targets = int((labels != IGNORE_INDEX).sum())
    print(f"{model}: {sum(p.numel() for p in ours.parameters()):,} parameters, {len(ids)} tokens, {targets} targets")
    print(f"loss by target: {loss.item() / targets:.6f} (transformers {expected_loss.item() / targets:.6f})")
    for name, value in differences.items():
        verdict = "ok" if value <= LIMITS[name] else "DIFFERS"  # NaN differs
        print(f"{name:10} relative difference {value:.2e} (limit {LIMITS[name]:.0e}) {verdict}")
    print(f"largest gradient difference: {worst}")
    _print_remarks(remarks)
    if not all(value <= LIMITS[name] for name, value in differences.items()):
        raise SystemExit(f"{model}: our model does not agree with transformers'")


def _print_layout(model: str, layout: Layout) -> None:
    print(f"{model}: the layout of published DeepSeek-V3 weights in {layout.dtype.upper()}")
    for name, value in (
        ("files", layout.files),
        ("tensors", layout.tensors),
        ("bytes", layout.nbytes),
        ("parameters of the main model", layout.parameters),
        ("parameters of the multi-token prediction", layout.mtp_parameters),
        ("its copies of embedding and head", layout.mtp_copies),
    ):
        print(f"{name:40} {value:>19,}")


def _print_remarks(remarks: list[str]) -> None:
    for remark in remarks:
        print(f"note: {remark}")


def _check_memory(config: Any) -> None:
    parameters = sum(torch.Size(shape).numel() for shape in hf_shapes(config, mtp=False).values())
    needed, available = 4 * 4 * parameters, psutil.virtual_memory().available
    if needed > 0.9 * available:
        raise UserError(
            f"{parameters / 1e9:.1f}e9 parameters need {needed / GIB:.0f} GiB here (two models in fp32 with "
            f"gradients), {available / GIB:.0f} GiB are free. Verify a smaller model of the architecture, or use a "
            "machine with more memory."
        )


def _oracle(directory: str, config: DeepseekV3Config, source: HFDirectorySource) -> OracleModel:
    """transformers' model in fp32, opened as users do; FP8, which it cannot read on a CPU, by our own loop.

    Raises ValueError where transformers finds tensors missing or unexpected, the multi-token prediction's aside.
    """
    fields = read_config(directory)
    if fields.get("quantization_config") is None:
        oracle, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=None if transformers_knows(fields["model_type"]) else config,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            output_loading_info=True,
        )
        wrong = {
            kind: [n for n in names if not mtp_layer(str(n), config.num_hidden_layers)] for kind, names in info.items()
        }
        raise_listed(
            f"{directory}: transformers does not find the model's tensors:",
            [f"{kind}: {name}" for kind, names in wrong.items() for name in names],
        )
        return oracle
    config._attn_implementation = "eager"
    oracle = OracleModel(config).float()
    with torch.no_grad():
        for name, tensor in oracle.state_dict().items():
            base, stacked, kind = name.partition(".mlp.experts.")
            if not stacked:
                tensor.copy_(_whole(source, name))
                continue
            for index, expert in enumerate(tensor):
                parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                pieces = [_whole(source, f"{base}.mlp.experts.{index}.{part}.weight") for part in parts]
                expert.copy_(torch.cat(pieces))
    return oracle


def _whole(source: HFDirectorySource, name: str) -> Tensor:
    shape = source.shape(name)
    return source.read(name, 0, torch.Size(shape).numel()).view(shape)


def _gradient_differences(ours: DeepseekV3ForCausalLM, theirs: OracleModel) -> dict[str, float]:
    """By parameter of transformers' model; where both are zero (layers of experts without tokens) there is none."""
    pairs: dict[str, list[Tensor]] = {}
    for name, parameter in ours.named_parameters():
        base, stacked, rest = name.partition(".mlp.experts.")
        key = f"{base}.mlp.experts.{rest.split('.')[1]}" if stacked else name
        assert parameter.grad is not None
        pairs.setdefault(key, []).append(parameter.grad)
    differences = {}
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        gradient = torch.cat(pairs[name])
        if gradient.any() or parameter.grad.any():
            differences[name] = _relative(gradient, parameter.grad)
    return differences


def _relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())
