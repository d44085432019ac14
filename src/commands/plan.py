"""`plan`: does a config's run fit, how long does it take, what does it wait for; from the config alone."""

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from tqdm import tqdm

from src.commands.config_command import ConfigCommand
from src.commands.outputs import PICTURES, check_output
from src.datamodules import SFTDataModule
from src.datamodules.reader import expand
from src.datamodules.tokenizer import load_tokenizer
from src.planner.cluster import Cluster, read_cluster
from src.planner.picture import draw, write_trace
from src.planner.plan import Data, Plan, make_plan
from src.planner.report import as_json, scale_text, search_text, text
from src.planner.search import nearest, scale, search
from src.planner.settings import Settings
from src.planner.sizes import read_sizes, trained_part

ASSUMED_ROWS = 100_000
TOKENISED_HERE = 256 << 20  # bytes of data files; larger ones are estimated
BYTES_A_TOKEN = 4.2  # of JSON with English text: gsm8k's files have 4.1


class PlanCLI(ConfigCommand):
    """Exits with 1 where the run does not fit, with 2 where the question is wrong."""

    name = "plan"
    plan: Plan

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--json", action="store_true", help="as JSON instead of tables")
        parser.add_argument("--explain", action="store_true", help="each line's formula with its numbers")
        parser.add_argument("--search", action="store_true", help="the fastest settings around these that fit")
        parser.add_argument("--scale", action="store_true", help="the cost a token on 8 to 4,096 GPUs")
        parser.add_argument(
            "--cluster", type=str | None, default=None, help="the machines: a file of preflight --write"
        )
        parser.add_argument(
            "--trace", type=str | None, default=None, help="write the simulated micro-step for Perfetto"
        )
        parser.add_argument("--picture", type=str | None, default=None, help="draw the simulated micro-step")
        parser.add_argument(
            "--document_length",
            type=int | None,
            default=None,
            help="tokens of a document; by default the data's mean over tokens, else one document a row",
        )

    def run_command(self) -> None:
        config = self.config
        try:
            check_output("--trace", config.trace)
            check_output("--picture", config.picture, PICTURES)
            if config.picture and find_spec("matplotlib") is None:
                raise ValueError("--picture needs matplotlib: pip install matplotlib, or the extra `demo`.")
            cluster = read_cluster(config.cluster) if config.cluster else Cluster()
            self.plan = plan_of(config, cluster)
        except ValueError as error:
            self.parser.error(str(error))
        self._answer(config, cluster)

    def _answer(self, config: Namespace, cluster: Cluster) -> None:
        settings, data = self.plan.settings, self.plan.data
        found = nearest(settings, cluster, data) if not self.plan.fits else None
        best = (
            search(settings, cluster, data, lambda rates, count: tqdm(rates, "search", count, disable=None))
            if config.search
            else None
        )
        sizes = scale(settings, cluster, data) if config.scale else None
        if config.json:
            answer = as_json(self.plan)
            if found:
                answer["nearest"] = {"change": found[0], "verdict": found[1].verdict}
            for key, plans in (("search", best), ("scale", sizes)):
                if plans is not None:
                    answer[key] = [as_json(p) | {"options": p.settings.options()} for p in plans]
            print(json.dumps(answer, indent=2))
        else:
            print(text(self.plan, config.explain))
            if found:
                print(f"The nearest that fits: {found[0]}\n  {found[1].verdict}")
            elif not self.plan.fits:
                print(
                    "No three changes of offload, batch, SP, shards, saves or up to four times the nodes make it fit."
                )
            for answered in (best is not None and search_text(best), sizes is not None and scale_text(sizes)):
                if answered:
                    print(f"\n{answered}")
        if config.trace:
            write_trace(config.trace, self.plan.time.spans)
        if config.picture:
            draw(config.picture, self.plan.time.spans, f"One micro-step, simulated: {settings.options()}")
        if not self.plan.fits:
            raise SystemExit(1)


def plan_of(config: Namespace, cluster: Cluster) -> Plan:
    """The plan of parsed arguments. Raises ValueError where they contradict each other or a file is not there."""
    settings = settings_of(config, cluster)
    data, document = data_of(config, settings)
    if getattr(config, "document_length", None) is not None:
        document = config.document_length
    return make_plan(replace(settings, document=document), cluster, data)


class _Silent(PlanCLI):
    def _answer(self, config: Namespace, cluster: Cluster) -> None:
        """Nothing: the plan is there."""


def verdict(config: str | Path, *arguments: str) -> str:
    """The plan's one line for a config file on the guide's cluster: what the comment in the file says."""
    return _Silent(["--config", str(config), *arguments]).plan.verdict


def settings_of(config: Namespace, cluster: Cluster) -> Settings:
    trainer, model, data = config.trainer, config.model, config.data
    if not isinstance(trainer.strategy, Namespace):
        raise ValueError(f"trainer.strategy is {trainer.strategy!r}; plan knows src.strategies.DeepSpeedSPStrategy.")
    options: dict[str, Any] = trainer.strategy.get("init_args", Namespace()).as_dict()
    options |= trainer.strategy.get("dict_kwargs", {}) or {}
    for name, known in (("config", None), ("offload_optimizer_device", "cpu"), ("offload_params_device", "cpu")):
        if options.get(name, known) != known:
            raise ValueError(
                f"trainer.strategy.init_args.{name} is {options[name]!r}: plan reads no DeepSpeed configuration and "
                "knows no nvme; give stage, offload_optimizer, offload_parameters and reduce_bucket_size as arguments."
            )
    gpus = _devices(trainer.devices, cluster)
    experts = None if model.experts_per_shard == "auto" else model.experts_per_shard
    sizes = read_sizes(model.pretrained, experts, model.mtp_loss_weight > 0)
    kernel = {"auto": "flash_attn_4"}.get(model.attention_kernel, model.attention_kernel)
    return Settings(
        sizes=sizes,
        nodes=trainer.num_nodes,
        gpus=gpus,
        sp=options.get("sequence_parallel_size", 1),
        stage=options.get("stage", 3),
        offload_optimizer=options.get("offload_optimizer", False),
        offload_parameters=options.get("offload_parameters", False),
        batch_size=data.batch_size,
        max_length=data.max_length,
        accumulate=trainer.accumulate_grad_batches,
        document=data.max_length,
        activation_checkpointing=model.activation_checkpointing,
        attention_output=model.attention_output,
        layer_input=model.layer_input,
        attention_kernel=kernel,
        param_bytes=4 if str(trainer.precision).startswith("32") else 2,
        trained=trained_part(sizes, model.freeze or []),
        reduce_bucket=options.get("reduce_bucket_size", 200_000_000),
        num_workers=data.num_workers,
        checkpoint_every=config.checkpoint.every_n_train_steps,
        keep=config.checkpoint.keep,
        async_save=config.checkpoint.async_save,
        weights_kept=config.weights.keep if config.weights.every_n_train_steps else 0,
        export=config.export.out is not None,
        uncounted=_uncounted(config),
        cpu=trainer.accelerator == "cpu",
    )


def _devices(devices: Any, cluster: Cluster) -> int:
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdecimal() else cluster.gpus_per_node


def _uncounted(config: Namespace) -> tuple[str, ...]:
    """What the run does besides, whose time no plan counts."""
    does = {
        "validation": bool(config.data.val_files or config.data.val_sets),
        "samples": bool(config.samples.every_n_steps),
        "weights saves": bool(config.weights.every_n_train_steps),
        "the export at the end": config.export.out is not None,
    }
    return tuple(what for what, is_on in does.items() if is_on)


def data_of(config: Namespace, settings: Settings) -> tuple[Data, float]:
    """The rows and tokens of an epoch, and a document's length as a token sees it on average."""
    steps = config.trainer.max_steps if config.trainer.max_steps > 0 else None
    epochs: int | None = config.trainer.max_epochs
    no_end = ""
    if epochs is None or epochs < 0:
        epochs = None if steps else 1
        no_end = "" if steps else "; no trainer.max_epochs, one epoch is counted"
    rows, tokens, source, document = _counted(config, settings)
    limit = config.trainer.limit_train_batches
    if limit is not None:  # of an epoch: so many micro-steps, or so large a part
        whole, batch = rows, settings.dp * settings.batch_size
        rows = min(rows, max(1, int(rows * limit) if isinstance(limit, float) else limit * batch))
        tokens = tokens * rows // whole
        source += f"; of which trainer.limit_train_batches {limit} takes {rows:,} rows" if rows < whole else ""
    return Data(rows, tokens, epochs, source + no_end, steps), document


def _counted(config: Namespace, settings: Settings) -> tuple[int, int, str, float]:
    """Rows and tokens of an epoch, where the numbers are from, and a document's length."""
    length = settings.max_length
    files = _present(config.data.train_files)
    if files is None:
        rows = ASSUMED_ROWS
        source = f"{', '.join(config.data.train_files)} not here; assumed: {rows:,} full rows, one document each"
        return rows, rows * length, source, length
    size = sum(os.path.getsize(file) for file in files)
    values = config.data.as_dict()
    values["tokenizer"] = values["tokenizer"] or config.model.pretrained
    reason = None
    if size > TOKENISED_HERE:
        reason = f"more than {TOKENISED_HERE >> 20} MiB"
    else:
        try:
            load_tokenizer(values["tokenizer"])
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0].split("; ")[0]
    if reason is not None:
        tokens = int(size / BYTES_A_TOKEN)
        rows = max(1, -(-tokens // length))
        many = f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"
        rough = (
            " (a rough guess for Parquet, which is compressed)" if any(f.endswith(".parquet") for f in files) else ""
        )
        source = (
            f"{many} of files, not tokenised: {reason}; estimated: {BYTES_A_TOKEN} bytes a token{rough}, full rows, "
            "one document each (give --document_length; `check-data` counts)"
        )
        return rows, tokens, source, length
    values["val_files"] = values["val_sets"] = None
    module = SFTDataModule(**values)
    module.setup("fit")
    assert module.train_set is not None
    packed = module.train_set
    lengths = packed.cache.lengths.astype("int64")
    rows, tokens = packed.rows_an_epoch, int(lengths.sum() * packed.rows_an_epoch / len(packed.rows))
    document = float((lengths**2).sum() / lengths.sum())
    source = (
        f"{len(lengths):,} samples, {lengths.sum():,} tokens, {rows:,} rows an epoch, documents of {document:,.0f} "
        "tokens (the mean over tokens)"
    )
    return rows, tokens, source, document


def _present(patterns: list[str]) -> list[str] | None:
    try:
        return expand(patterns)
    except ValueError:
        return None
