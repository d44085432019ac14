"""A parsed config as the planner sees it: settings, data and plan.

Without torch and Lightning; the tokenizer's libraries are imported only if there is data to count.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from jsonargparse import Namespace

from src.commands.mtp_weight import mtp_loss_weight
from src.datamodules.files import NoMatch, expand
from src.datamodules.limits import Limits, check_training, check_validation
from src.errors import UserError
from src.models.deepseek_v3.sizes import read_sizes, trained_part
from src.planner import account
from src.planner.cluster import Cluster, read_cluster
from src.planner.ledger import total
from src.planner.plan import Data, Plan, make_plan
from src.planner.settings import OPTIONS, Settings
from src.strategies.zero_limits import STRATEGY
from src.units import GIB, counted

ASSUMED_ROWS = 100_000
TOKENISED_HERE = 256 << 20  # bytes of data files; larger ones are estimated
PACKED = (".parquet", ".gz", ".zst")
BYTES_A_TOKEN = 4.2  # of JSON with English text: gsm8k's files have 4.1


def plan_of(config: Namespace) -> Plan:
    """The plan of parsed arguments. Raises ValueError if they contradict each other or a file is missing."""
    cluster = read_cluster(config.cluster) if config.cluster else Cluster()
    settings = settings_of(config, cluster)
    data, document = data_of(config, settings)
    if config.get("document_length") is None:
        settings = settings.but(document=document)
    return make_plan(settings, cluster, data)


def settings_of(config: Namespace, cluster: Cluster) -> Settings:
    trainer, model = config.trainer, config.model
    if not isinstance(trainer.strategy, Namespace):
        raise UserError(f"trainer.strategy is {trainer.strategy!r}; plan knows src.strategies.DeepSpeedSPStrategy.")
    options: dict[str, Any] = trainer.strategy.get("init_args", Namespace()).as_dict()
    options |= trainer.strategy.get("dict_kwargs", {}) or {}
    for name, known in (("config", None), ("offload_optimizer_device", "cpu"), ("offload_params_device", "cpu")):
        if options.get(name, known) != known:
            raise UserError(
                f"{STRATEGY}{name} is {options[name]!r}: plan reads no DeepSpeed configuration and knows no nvme; "
                "give stage, offload_optimizer, offload_parameters and reduce_bucket_size as arguments."
            )
    experts = None if model.experts_per_shard == "auto" else model.experts_per_shard
    mtp = model.mtp_loss_weight != 0 and mtp_loss_weight(model) > 0
    sizes = read_sizes(model.pretrained, experts, mtp, options.get("expert_parallel_size", 1))
    given = {f"{STRATEGY}{name}": value for name, value in options.items()}
    same = {field: given.get(option, config.get(option)) for field, option in OPTIONS.items()}
    auto_kernel = "flash_attn_4" if cluster.card.hopper else "varlen"
    named = {
        "gpus": _devices(trainer.devices, cluster),
        "document": config.get("document_length", None) or config.data.max_length,
        "attention_kernel": auto_kernel if model.attention_kernel == "auto" else model.attention_kernel,
        "experts_per_shard": None,  # sizes has it
    }
    return Settings(
        sizes=sizes,
        param_bytes=4 if str(trainer.precision).startswith("32") else 2,
        trained=trained_part(sizes, model.freeze or []),
        weights_kept=config.weights.keep if config.weights.every_n_train_steps else 0,
        export=config.export.out is not None,
        uncounted=_uncounted(config),
        cpu=trainer.accelerator == "cpu",
        **{field: value for field, value in (same | named).items() if value is not None},
    )


def host_memory(config: Namespace, available: int) -> tuple[str, bool]:
    """One line on a node's memory during a run, and whether `available` bytes are too few.

    Raises:
        ValueError: as `settings_of`.
    """
    lines = account.host(settings_of(config, Cluster()))
    needed = total(lines)
    parts = ", ".join(f"{line.name} {line.nbytes / GIB:.0f} GiB {line.when}" for line in lines)
    said = f"host memory of a node: {parts}; total {needed / GIB:.0f} GiB by the plan, {available / GIB:.0f} are free"
    return said, needed > available


def _devices(devices: Any, cluster: Cluster) -> int:
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdecimal() else cluster.gpus_per_node


def _uncounted(config: Namespace) -> tuple[str, ...]:
    """What the run does in addition and the plan's time does not count."""
    does = {
        "validation": bool(config.data.val_files or config.data.val_sets),
        "samples": bool(config.samples.every_n_steps),
        "weights saves": bool(config.weights.every_n_train_steps),
        "the export at the end": config.export.out is not None,
    }
    return tuple(what for what, is_on in does.items() if is_on)


def data_of(config: Namespace, settings: Settings) -> tuple[Data, float]:
    """Rows and tokens of an epoch, and the mean document length over tokens."""
    steps = config.trainer.max_steps if config.trainer.max_steps > 0 else None
    epochs: int | None = config.trainer.max_epochs
    no_end = ""
    if epochs is None or epochs < 0:
        epochs = None if steps else 1
        no_end = "" if steps else "; no trainer.max_epochs, one epoch is counted"
    rows, tokens, source, document = _counted(config, settings)
    limit = config.trainer.limit_train_batches
    if limit is not None:  # an epoch's micro-steps, or a fraction of them
        whole, batch = rows, settings.dp * settings.batch_size
        rows = min(rows, max(1, int(rows * limit) if isinstance(limit, float) else limit * batch))
        tokens = tokens * rows // whole
        source += f"; of which trainer.limit_train_batches {limit} takes {counted(rows, 'row')}" if rows < whole else ""
    return Data(rows, tokens, epochs, source + no_end, steps), document


def _counted(config: Namespace, settings: Settings) -> tuple[int, int, str, float]:
    """Rows and tokens of an epoch, the source of these numbers, and a document's length."""
    length = settings.max_length
    try:
        files = expand(config.data.train_files)
    except NoMatch:
        named = ", ".join(config.data.train_files)
        source = f"{named} not here; assumed: {ASSUMED_ROWS:,} full rows, one document each"
        return ASSUMED_ROWS, ASSUMED_ROWS * length, source, length
    size, values = sum(os.path.getsize(file) for file in files), _values(config)
    if (reason := _untokenised(size, values["tokenizer"])) is not None:
        tokens = int(size / BYTES_A_TOKEN)
        many = f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"
        rough = " (a rough guess for files that are compressed)" if any(f.endswith(PACKED) for f in files) else ""
        source = (
            f"{many} of files, not tokenised: {reason}; estimated: {BYTES_A_TOKEN} bytes per token{rough}, full rows, "
            "one document each (give --document_length; `check-data` counts)"
        )
        return max(1, -(-tokens // length)), tokens, source, length
    from src.datamodules.packed_set import pack_files

    packed = pack_files(values)
    lengths = packed.cache.lengths.astype("int64")
    rows, tokens = packed.rows_an_epoch, int(lengths.sum() * packed.rows_an_epoch / len(packed.rows))
    limits, dp, batch_size = Limits.of(config.trainer), settings.dp, settings.batch_size
    check_training(rows, dp, batch_size, settings.accumulate, limits)
    if isinstance(part := limits.limit_val_batches, float) and 0 < part < 1:  # else each set has a batch
        for name, files in _validation(config):
            here = pack_files(values | {"train_files": files, "train_weights": None})
            check_validation(name, here.rows_an_epoch, dp, batch_size, part)
    document = float((lengths**2).sum() / lengths.sum())
    source = (
        f"{counted(len(lengths), 'sample')}, {lengths.sum():,} tokens, {counted(rows, 'row')} per epoch, "
        f"documents of {document:,.0f} "
        f"tokens (the mean over tokens); rows are {packed.fill(length):.1%} full, and planned as full"
    )
    return rows, tokens, source, document


def _validation(config: Namespace) -> Iterator[tuple[str, list[str]]]:
    """Name and files of each validation set that is here and may be tokenised here."""
    sets = {"val": config.data.val_files} | {
        f"val {name}": files for name, files in (config.data.val_sets or {}).items()
    }
    for name, files in sets.items():
        with suppress(NoMatch):
            if files and sum(os.path.getsize(file) for file in expand(files)) <= TOKENISED_HERE:
                yield name, files


def _values(config: Namespace) -> dict[str, Any]:
    """SFTDataModule's arguments, with the tokenizer that it will have."""
    values: dict[str, Any] = config.data.as_dict()
    return values | {"tokenizer": values["tokenizer"] or config.model.pretrained}


def _untokenised(size: int, tokenizer: str) -> str | None:
    """Why so many bytes of data are not tokenised here; None where they are."""
    if size > TOKENISED_HERE:
        return f"more than {TOKENISED_HERE >> 20} MiB"
    from src.datamodules.tokenizer import load_tokenizer

    try:
        load_tokenizer(tokenizer)
    except (ValueError, OSError) as error:
        return str(error).splitlines()[0].split("; ")[0]
    return None


def row_lengths(config: Namespace) -> list[list[int]]:
    """The lengths of the documents of each row of the training data, in a random order, the same in every run.

    Raises:
        ValueError: the files or the tokenizer are not here.
    """
    expand(config.data.train_files)
    from src.datamodules.packed_set import pack_files

    packed = pack_files(_values(config))
    order = np.random.default_rng(0).permutation(len(packed.rows))  # packing puts the fullest first
    return [packed.cache.lengths[packed.rows[i]].tolist() for i in order]
