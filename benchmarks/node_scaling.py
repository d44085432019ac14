"""DP x SP layouts on the GPUs of one node, each a whole `fit` of the same rows from the same weights.

    python -m benchmarks.node_scaling --out FOLDER [--gpus 8] [--layers 2] [--experts 16] [--steps 20]
    python -m benchmarks.node_scaling --out FOLDER --parts experts --experts 96 --tokens 16384 --no-plan
    python -m benchmarks.node_scaling --out FOLDER --device cpu --gpus 4 --model configs/models/tiny --tokens 128 \\
        --vocab 1024 --steps 4

Every layout trains the same global batches of `gpus` rows of --tokens tokens, one document a row: a DP rank's
micro-batch is SP rows, so that each GPU has as many tokens whatever SP is, and fewer GPUs accumulate. Shown are losses
beside those of one GPU, tokens/s a GPU, memory, what `plan` says of the same arguments, SP's exchanges by themselves,
what NCCL's kernels cost and hide, and a checkpoint that half the GPUs resume and that is exported from the running job
and from the files. Part `experts`, if named, runs layouts of all GPUs that share experts by 1, 2, ... ranks, with
gradients sent in fp32, then in bf16. Part `hot_path`, if named, runs each layout of all GPUs with DeepSpeed's own
gather, reduction and step on the host too, and compares gradients, losses and weights bit by bit. With many experts the
states of one GPU no longer fit: name the layouts that do by --only.
Everything is written below --out; FOLDER/results.jsonl has one line a row.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.common import PEAK, TRUE_CONFIG, head, table
from benchmarks.scaling_run import host_in_use
from benchmarks.timeline import analyse, lines
from src.models.deepseek_v3 import load_config
from src.models.deepseek_v3.flops import step_flops
from src.rehearsal.timeline import read
from src.weights.key_map import hf_shapes

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user> {{ message['content'] }}"
    "{% else %}<assistant> {{ message['content'] }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Layout(NamedTuple):
    dp: int
    sp: int
    offload: bool = False
    ep: int = 1
    reduce_dtype: str = "fp32"

    @property
    def name(self) -> str:
        more = ["offload"] * self.offload + [f"ep{self.ep}"] * (self.ep > 1) + ["bf16"] * (self.reduce_dtype == "bf16")
        return "_".join([f"dp{self.dp}_sp{self.sp}", *more])


def layouts(gpus: int) -> list[Layout]:
    sizes = [2**i for i in range(gpus.bit_length()) if 2**i <= gpus]
    plain = [Layout(n // sp, sp) for n in sizes for sp in sizes if sp <= n]
    return plain + [layout._replace(offload=True) for layout in plain if layout.dp * layout.sp == gpus]


def expert_layouts(gpus: int) -> list[Layout]:
    sizes = [2**i for i in range(gpus.bit_length()) if 2**i <= gpus]
    return [Layout(gpus, 1, ep=ep, reduce_dtype=dtype) for dtype in ("fp32", "bf16") for ep in sizes]


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """A published directory: config.json, random bf16 weights, and a tokenizer of words with a chat template."""
    folder.mkdir(parents=True)
    fields = json.loads((Path(options.model) / "config.json").read_text())
    fields |= {"num_hidden_layers": options.layers, "vocab_size": options.vocab, "num_nextn_predict_layers": 0}
    fields["first_k_dense_replace"] = min(options.dense, options.layers)
    if options.experts:
        fields["n_routed_experts"] = options.experts
    fields.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    device = "cuda" if torch.cuda.is_available() and options.device == "cuda" else "cpu"
    torch.manual_seed(options.seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in hf_shapes(load_config(str(folder)), mtp=False).items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.zeros(shape)
        elif "norm" in name:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensors[name] = (torch.randn(shape, device=device) * 0.02).bfloat16().cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    special = ["<user>", "<assistant>", "<end>", "<unknown>"]
    words = special + [f"w{i}" for i in range(options.vocab - len(special))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )
    fast.add_special_tokens({"additional_special_tokens": special[:2]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def make_data(path: Path, rows: int, tokens: int, vocab: int, seed: int) -> None:
    """Conversations longer than a row, which `overlong truncate` cuts to it; words fall in frequency as 1/rank."""
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(vocab - 4)]
    weights = [1 / (i + 1) for i in range(len(words))]
    with path.open("w") as file:
        for _ in range(rows):
            answer = " ".join(draw.choices(words, weights, k=tokens))
            messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)
        self.weights = Path(options.weights or self.out / "model")
        self.log = (self.out / "log.txt").open("a")
        self.lines: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def run(self, command: list[str], shown: bool = False, **environment: str) -> float:
        """Seconds of a command that must succeed; its output goes to the log, or is shown."""
        began = time.perf_counter()
        self.log.write(f"\n$ {' '.join(command)}\n")
        self.log.flush()
        out, env = None if shown else self.log, os.environ | environment
        result = subprocess.run(command, cwd=ROOT, stdout=out, stderr=self.log, env=env)
        if result.returncode:
            raise SystemExit(f"failed, see {self.log.name}: {' '.join(command)}")
        return time.perf_counter() - began

    def torchrun(self, processes: int, *command: str, shown: bool = False, **environment: str) -> float:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return self.run([*launch, *command], shown, **environment)

    def arguments(self, layout: Layout, other: str | None = None, tokens: int | None = None) -> list[str]:
        """other: the name below --out of a model and its data, in place of the main ones."""
        o, model = self.options, str(self.out / other if other else self.weights)
        values = {
            "config": "configs/1gpu_small.yaml",
            "trainer.accelerator": o.device,
            "trainer.precision": "bf16-true" if o.device == "cuda" else "32-true",
            "trainer.devices": layout.dp * layout.sp,
            "trainer.strategy.init_args.sequence_parallel_size": layout.sp,
            "trainer.strategy.init_args.offload_optimizer": str(layout.offload).lower(),
            "trainer.strategy.init_args.expert_parallel_size": layout.ep,
            "trainer.strategy.init_args.reduce_dtype": layout.reduce_dtype,
            "trainer.accumulate_grad_batches": o.gpus // (layout.dp * layout.sp),
            "trainer.max_steps": o.steps,
            "trainer.limit_val_batches": 0,
            "trainer.enable_progress_bar": "false",
            "model.pretrained": model,
            "model.from_scratch": "false",
            "model.attention_output": "keep",
            "model.learning_rate": 1e-4,
            "model.min_learning_rate": 1e-5,
            "data.train_files": f"[{self.out}/{other or 'train'}.jsonl]",
            "data.val_files": "null",
            "data.tokenizer": model,
            "data.max_length": tokens or o.tokens,
            "data.batch_size": layout.sp,
            "data.cache_dir": str(self.out / "cache"),
        }
        return [*(f"--{name}={value}" for name, value in values.items()), *(f"--{text}" for text in o.more)]

    def fit(
        self, name: str, layout: Layout, *more: str, callbacks: Iterable[str] = (), **recorder: str
    ) -> dict[str, Any]:
        record = self.out / f"{name}.json"
        names = [*callbacks, "benchmarks.scaling_run.Recorder"]
        inits = {"out": str(record), **recorder}
        seconds = self.torchrun(
            layout.dp * layout.sp,
            *("-m", "src.cli", "fit", *more, f"--trainer.default_root_dir={self.out / 'runs' / name}"),
            *(f"--trainer.callbacks+={name}" for name in names),
            *(f"--trainer.callbacks.init_args.{key}={value}" for key, value in inits.items()),
        )
        return json.loads(record.read_text()) | {"name": name, "whole_s": seconds}

    def plan(self, arguments: list[str]) -> dict[str, Any]:
        """What `plan --json` says of the same arguments; empty where it has none for the device."""
        if self.options.no_plan:
            return {}
        cluster = [f"--cluster={self.options.cluster}"] if self.options.cluster else []
        command = [sys.executable, "-m", "src.cli", "plan", *arguments, *cluster, "--json"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        try:
            return json.loads(result.stdout[result.stdout.index("{") :])
        except ValueError:
            self.log.write(result.stdout + result.stderr)
            return {}

    def scaling(self) -> None:
        self.layouts(layouts(self.options.gpus))

    def experts(self) -> None:
        self.layouts(expert_layouts(self.options.gpus))

    def layouts(self, some: Iterable[Layout]) -> None:
        """Each layout's steps."""
        o = self.options
        config = load_config(str(self.weights))
        flops = step_flops(config, [o.tokens] * o.gpus, o.tokens * o.gpus)
        cells, first = [], None
        for layout in some:
            if o.only and layout.name not in o.only:
                continue
            arguments = self.arguments(layout)
            n = layout.dp * layout.sp
            traced = n == o.gpus > 1 and o.device == "cuda"
            trace = {"trace": str(self.out / f"{layout.name}.trace.json")} if traced else {}
            before = host_in_use() / 2**30
            line = self.fit(layout.name, layout, *arguments, **trace)
            line["host_gib"] -= before
            plan = self.plan(arguments)
            predicted = []
            if plan:  # these runs save nothing
                host = sum(line["bytes"] for line in plan["host"]["lines"] if "save" not in line["name"])
                predicted = [plan["time"]["step_s"], plan["device"]["allocated"] / 2**30, host / 2**30]
            first = first or line
            line |= {"kind": "layout", **layout._asdict(), "gpus": n, "tokens": o.tokens}
            line["tokens_per_s_gpu"] = o.tokens * o.gpus / line["step_s"] / n
            line["mfu"] = flops / line["step_s"] / n / PEAK
            line["loss_difference"] = max(abs(a - b) for a, b in zip(line["losses"], first["losses"], strict=True))
            line["plan"] = predicted
            if trace:
                line["nccl"] = analyse(read(packed(Path(trace["trace"]))))
            self.add(line)
            ratio = line["tokens_per_s_gpu"] / first["tokens_per_s_gpu"]
            memory = f"{line['peak_gib']:.1f} ({line['reserved_gib']:.1f})" if "peak_gib" in line else ""
            cells.append(
                [
                    layout.name,
                    f"{line['step_s']:.3f}",
                    f"{line['tokens_per_s_gpu']:.0f}",
                    f"{ratio:.3f}",
                    f"{line['mfu']:.1%}",
                    memory,
                    f"{line['host_gib']:.1f}",
                    f"{line['losses'][0]:.4f} to {line['losses'][-1]:.4f}",
                    f"{line['loss_difference']:.1e}",
                    ", ".join(f"{x:.2f}" for x in predicted),
                ]
            )
            print(cells[-1], flush=True)
        print()
        columns = (
            "layout|step s|tokens/s a GPU|to the first|MFU|peak (reserved) GiB|host GiB|loss|largest difference|"
            "plan: s, GiB, host GiB"
        )
        table(columns.split("|"), cells)
        for line in self.lines:
            if "nccl" in line:
                print(f"\n{line['name']}, one step of rank 0:")
                print("\n".join(f"- {text}" for text in lines(line["nccl"])))

    def hot_path(self) -> None:
        """ZeRO-3 by `src/strategies/zero3_*.py` and `host_optimizer.py`, and by what they replace."""
        o, cells = self.options, []
        for layout in layouts(o.gpus):
            if layout.dp * layout.sp < o.gpus or (o.only and layout.name not in o.only):
                continue
            runs = {}
            for path, callbacks in (("ours", []), ("DeepSpeed's", ["benchmarks.scaling_run.DeepSpeedsOwn"])):
                name = f"{layout.name}_{path[:4]}"
                trace = {"trace": str(self.out / f"{name}.trace.json")} if o.device == "cuda" else {}
                arguments = self.arguments(layout)
                line = self.fit(name, layout, *arguments, callbacks=callbacks, checksums="true", **trace)
                line |= {"kind": "hot_path", "path": path}
                if trace:
                    line["nccl"] = analyse(read(packed(Path(trace["trace"]))))
                self.add(line)
                runs[path] = line
            ours, theirs = runs.values()
            equal = [ours["checksums"][key] == theirs["checksums"][key] for key in ("gradients", "masters")]
            cells.append(
                [
                    layout.name,
                    *(f"{line['step_s']:.3f}" for line in (theirs, ours)),
                    f"{theirs['step_s'] / ours['step_s']:.2f}",
                    *(f"{line.get('peak_gib', 0):.1f}" for line in (theirs, ours)),
                    *(f"{line['nccl']['device_ms']:.0f}" if "nccl" in line else "" for line in (theirs, ours)),
                    *("bit-equal" if same else "DIFFER" for same in equal),
                    f"{max(abs(a - b) for a, b in zip(ours['losses'], theirs['losses'], strict=True)):.1e}",
                ]
            )
            print(cells[-1], flush=True)
        columns = (
            "layout|step s, DeepSpeed's|ours|ratio|peak GiB, DeepSpeed's|ours|device ms of a step, DeepSpeed's|ours|"
            "first gradients|masters at the end|largest difference of losses"
        )
        table(columns.split("|"), cells)

    def exchanges(self) -> None:
        """SP's collectives of one layer, by themselves."""
        cells = []
        for size in (2**i for i in range(1, self.options.gpus.bit_length())):
            if size > self.options.gpus:
                break
            record = self.out / f"exchange{size}.json"
            self.torchrun(size, "-m", "benchmarks.scaling_run", str(record), str(self.options.tokens))
            line = json.loads(record.read_text()) | {"kind": "exchange"}
            self.add(line)
            numbers = [line[k] for k in ("latents_mib", "latents_ms", "expanded_mib", "expanded_ms")]
            cells.append([size, *(f"{x:.2f}" for x in numbers), f"{line['expanded_ms'] / line['latents_ms']:.2f}"])
        print(f"\nOne layer's exchanges of a row of {self.options.tokens} tokens, forward\n")
        table(["SP", "latents MiB", "ms", "expanded MiB", "ms", "ratio of times"], cells)

    def beside(self) -> None:
        """NCCL's kernels beside computation, as many thread blocks as NCCL takes, and few."""
        if self.options.device == "cpu":
            return
        print(flush=True)
        for few in ("", "8"):
            limit = {"NCCL_MAX_CTAS": few} if few else {}
            out = f"--out={self.out / 'results.jsonl'}"
            self.torchrun(self.options.gpus, "-m", "benchmarks.nccl_beside", out, shown=True, **limit)

    def resume(self) -> None:
        """A checkpoint of one SP group in the middle, taken up by half the ranks without SP; its two exports."""
        o = self.options
        whole, half = Layout(1, o.gpus), Layout(max(1, o.gpus // 2), 1)
        small = argparse.Namespace(**vars(o))
        small.model, small.layers, small.experts = str(ROOT / "configs/models/small"), 2, 16
        if o.device == "cpu":
            small.model, small.experts = o.model, o.experts
        make_model(self.out / "resume", small)
        tokens = min(o.tokens, 4096)
        make_data(self.out / "resume.jsonl", o.gpus * o.steps, tokens, o.vocab, o.seed)
        middle = o.steps // 2
        live, files = self.out / "live", self.out / "files"
        arguments = self.arguments(whole, "resume", tokens)
        every = f"--checkpoint.every_n_train_steps={middle}"
        a = self.fit("resume_whole", whole, *arguments, every, f"--export.out={live}", keep_checkpoints="true")
        folder = self.out / "runs" / "resume_whole" / "checkpoints"
        start = f"--ckpt_path={folder / f'step={middle}.ckpt'}"
        b = self.fit("resume_half", half, *self.arguments(half, "resume", tokens), start)
        cli = [sys.executable, "-m", "src.cli"]
        self.run([*cli, "export", "--ckpt", str(folder / "last.ckpt"), "--out", str(files)])
        self.run([*cli, "verify", "--model", str(files), "--layout-only"])
        names = sorted(p.name for p in files.glob("*.safetensors"))
        equal = all((files / name).read_bytes() == (live / name).read_bytes() for name in names)
        difference = max(abs(x - y) for x, y in zip(a["losses"][middle:], b["losses"], strict=True))
        line = {
            "kind": "resume",
            "from": whole.name,
            "to": half.name,
            "difference": difference,
            "live_export_equal": equal,
        }
        self.add(line | {"losses": a["losses"], "resumed": b["losses"]})
        print(
            f"\n{whole.name} resumed at step {middle} as {half.name}: {o.steps - middle} losses differ by at most "
            f"{difference:.1e}; the running job's export {'equals' if equal else 'DIFFERS from'} that of its files."
        )


def packed(trace: Path) -> Path:
    """The trace compressed, in its place."""
    target = Path(f"{trace}.gz")
    with trace.open("rb") as source, gzip.open(target, "wb", 4) as file:
        shutil.copyfileobj(source, file)
    trace.unlink()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="a folder that is made; it must not exist")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--gpus", type=int, default=0, help="processes; 0: all GPUs")
    parser.add_argument("--model", default=str(TRUE_CONFIG))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dense", type=int, default=0)
    parser.add_argument("--experts", type=int, default=16, help="0: as the model has")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="layouts by name, e.g. dp1_sp1 dp1_sp2")
    parser.add_argument("--weights", help="the folder of the model, made where it is not there yet, and kept")
    parser.add_argument("--no-plan", action="store_true")
    parser.add_argument("--cluster", help="what `preflight --write` has measured here, for plan")
    parser.add_argument("--more", nargs="*", default=[], help="arguments of fit and plan, NAME=VALUE")
    parser.add_argument("--parts", nargs="*", default=["scaling", "exchanges", "beside", "resume"])
    options = parser.parse_args()
    options.gpus = options.gpus or torch.cuda.device_count()
    if options.gpus < 1 or options.gpus & (options.gpus - 1):
        raise SystemExit(f"--gpus {options.gpus}: a power of two is needed")
    out = Path(options.out)
    out.mkdir(parents=True)
    bench = Bench(options)
    if not bench.weights.exists():
        make_model(bench.weights, options)
    make_data(out / "train.jsonl", options.gpus * options.steps, options.tokens, options.vocab, options.seed)
    head(f"DP x SP on {options.gpus} {options.device}, {vars(options)}", torch.device(options.device))
    for part in options.parts:
        getattr(bench, part)()
    if not options.weights:
        shutil.rmtree(bench.weights)


if __name__ == "__main__":
    main()
