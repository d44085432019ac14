"""The values that a run's options may have: one table for all commands.

jsonargparse checks types; combinations of options, with the model or the data, are checked where those are known.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pkgutil import resolve_name
from typing import Any, NamedTuple

from jsonargparse import Namespace

from src.commands.options import STRATEGY_CLASS
from src.errors import UserError
from src.strategies.zero_limits import STRATEGY, check_stage
from src.weights.file_size import parse_size

LARGEST = 2**53  # above it a number is a slip, and a float no longer holds every integer


class Range(NamedTuple):
    """An interval in mathematical notation, and what its values mean."""

    within: str
    what: str
    also: tuple[float, ...] = ()  # values outside it with a special meaning
    part: str = ""  # the interval for fractions, if whole numbers are counts

    def holds(self, value: float) -> bool:
        within = self.part if self.part and isinstance(value, float) else self.within
        least, most = (float(end) for end in within[1:-1].split(","))
        inside = (least <= value if within[0] == "[" else least < value) and (
            value <= most if within[-1] == "]" else value < most
        )
        return value in self.also or inside

    def __str__(self) -> str:
        also = "".join(f" or {value:g}" for value in self.also)
        part = f", or a fraction in {self.part}" if self.part else ""
        return f"it must be in {self.within}{also}{part}: {self.what}"


# In the order of `fit --help`. Interval, and the sentence that a refusal ends with.
RANGES = {
    "seed_everything": Range("[0, 4294967295]", "the seed of all random numbers"),
    "trainer.num_nodes": Range("[1, 65536]", "nodes of the job"),
    "trainer.fast_dev_run": Range("[0, 1e6]", "batches of a trial run"),
    "trainer.max_epochs": Range("[1, 1e6]", "epochs, -1 for no end", also=(-1,)),
    "trainer.min_epochs": Range("[0, 1e6]", "epochs"),
    "trainer.max_steps": Range("[1, 1e9]", "optimizer steps, -1 for those of all epochs", also=(-1,)),
    "trainer.min_steps": Range("[0, 1e9]", "optimizer steps"),
    "trainer.limit_train_batches": Range("[1, 1e12]", "micro-batches of an epoch", part="(0, 1]"),
    "trainer.limit_val_batches": Range("[0, 1e12]", "batches of a validation", part="[0, 1]"),
    "trainer.limit_test_batches": Range("[0, 1e12]", "batches of a test", part="[0, 1]"),
    "trainer.limit_predict_batches": Range("[0, 1e12]", "batches of a prediction", part="[0, 1]"),
    "trainer.overfit_batches": Range("[0, 1e12]", "batches", part="[0, 1]"),
    "trainer.val_check_interval": Range("[1, 1e12]", "micro-batches between validations", part="(0, 1]"),
    "trainer.check_val_every_n_epoch": Range("[1, 1e6]", "epochs between validations"),
    "trainer.num_sanity_val_steps": Range("[0, 1e12]", "batches validated before training, -1 for all", also=(-1,)),
    "trainer.log_every_n_steps": Range("[1, 1e9]", "optimizer steps between logged values"),
    "trainer.accumulate_grad_batches": Range("[1, 65536]", "micro-batches per optimizer step"),
    "trainer.gradient_clip_val": Range("[0, 1e6]", "the largest norm of a gradient, 0 to clip none"),
    "trainer.reload_dataloaders_every_n_epochs": Range("[0, 1e6]", "epochs, 0 for never"),
    f"{STRATEGY}sequence_parallel_size": Range("[1, 4096]", "ranks that share a row"),
    f"{STRATEGY}expert_parallel_size": Range("[1, 4096]", "ranks that share a layer's experts"),
    f"{STRATEGY}stage": Range("[0, 3]", "ZeRO's stage; a real model needs 3"),
    f"{STRATEGY}reduce_node_size": Range("[1, 65536]", "processes of a node"),
    f"{STRATEGY}params_buffer_count": Range("[1, 1e6]", "buffers for offloaded parameters"),
    f"{STRATEGY}params_buffer_size": Range("[1, 1e12]", "elements of a buffer"),
    f"{STRATEGY}max_in_cpu": Range("[0, 1e15]", "parameters kept in host memory"),
    f"{STRATEGY}optimizer_buffer_count": Range("[1, 1e6]", "buffers for offloaded states"),
    f"{STRATEGY}block_size": Range("[1, 1e12]", "bytes of an I/O block"),
    f"{STRATEGY}queue_depth": Range("[1, 65536]", "I/O requests in flight"),
    f"{STRATEGY}thread_count": Range("[1, 65536]", "I/O threads"),
    f"{STRATEGY}sub_group_size": Range("[1, 1e15]", "parameters stepped at once"),
    f"{STRATEGY}allgather_bucket_size": Range("[1, 1e12]", "elements gathered at once"),
    f"{STRATEGY}reduce_bucket_size": Range("[1, 1e12]", "elements reduced at once"),
    f"{STRATEGY}logging_batch_size_per_gpu": Range("[1, 65536]", "rows"),
    f"{STRATEGY}logging_level": Range("[0, 50]", "a level of Python's logging"),
    f"{STRATEGY}loss_scale": Range("[0, 1e9]", "of fp16, 0 for a dynamic one"),
    f"{STRATEGY}initial_scale_power": Range("[0, 64]", "of fp16's loss scale, a power of 2"),
    f"{STRATEGY}loss_scale_window": Range("[1, 1e9]", "steps before fp16's loss scale grows"),
    f"{STRATEGY}hysteresis": Range("[1, 1e6]", "overflows before fp16's loss scale falls"),
    f"{STRATEGY}min_loss_scale": Range("[0, 1e9]", "of fp16"),
    "model.learning_rate": Range("[0, 1]", "AdamW's; 1e-7 to 1e-4 is usual"),
    "model.min_learning_rate": Range("[0, 1]", "where the learning rate ends, at most model.learning_rate"),
    "model.betas": Range("[0, 1)", "AdamW's two rates of decay"),
    "model.weight_decay": Range("[0, 1]", "AdamW's, 0 for none"),
    "model.warmup_ratio": Range("[0, 1)", "the part of all optimizer steps over which the rate rises"),
    "model.mtp_loss_weight": Range("[0, 10]", "beside the next token's loss, 0 builds no block"),
    "model.aux_loss_alpha": Range("[0, 10]", "the balance loss's factor, 0 turns it off"),
    "model.router_bias_update_speed": Range("[0, 1]", "a router bias's move in a step, 0 leaves it"),
    "model.experts_per_shard": Range("[1, 65536]", "experts gathered at once, or auto"),
    "data.train_weights": Range("(0, 1e6]", "how often an entry of train_files is in an epoch"),
    "data.max_length": Range("[2, 16777216]", "tokens of a packed row"),
    "data.batch_size": Range("[1, 65536]", "packed rows of a micro-batch"),
    "data.num_workers": Range("[0, 1024]", "processes per rank that assemble batches"),
    "data.seed": Range(f"[0, {LARGEST}]", "of the rows' order"),
    "checkpoint.every_n_train_steps": Range("[0, 1e9]", "optimizer steps between checkpoints, 0 for one at the end"),
    "checkpoint.keep": Range("[1, 1e6]", "checkpoints kept, the newest"),
    "weights.every_n_train_steps": Range("[0, 1e9]", "optimizer steps between exports, 0 for none"),
    "weights.keep": Range("[1, 1e6]", "exports kept, the newest"),
    "stop.lead": Range("(0, 864000]", "seconds before the end of the job's time"),
    "samples.every_n_steps": Range("[0, 1e9]", "optimizer steps between samples, 0 for none"),
    "rounding.every_n_steps": Range("[0, 1e9]", "optimizer steps between figures of what rounding leaves, 0 for none"),
    "samples.max_new_tokens": Range("[1, 1e6]", "tokens of an answer"),
    "samples.temperature": Range("[0, 100]", "0 takes the likeliest token"),
    "samples.seed": Range(f"[0, {LARGEST}]", "of the sampled tokens"),
    "watchdog.minutes": Range("[0, 100000]", "minutes without a change of phase, 0 turns the watchdog off"),
    # of one command
    "show": Range("[0, 1e6]", "conversations to print"),
    "search_nodes": Range("[1, 65536]", "nodes of the job"),
    "document_length": Range("[1, 16777216]", "tokens of a document"),
    "steps": Range("[2, 1e6]", "optimizer steps, of which the first compiles"),
    "gpu_memory": Range("(0, 1e6]", "GiB of a card"),
}

CHOICES = {
    "trainer.accelerator": ("auto", "cpu", "cuda", "gpu"),
    "trainer.precision": ("bf16-true", "32-true", "32", 32),
    "trainer.gradient_clip_algorithm": ("norm",),
    "trainer.profiler": ("simple", "advanced", "pytorch"),
    f"{STRATEGY}remote_device": ("cpu", "nvme"),
    f"{STRATEGY}offload_optimizer_device": ("cpu", "nvme"),
    f"{STRATEGY}offload_params_device": ("cpu", "nvme"),
    f"{STRATEGY}process_group_backend": ("nccl", "gloo"),
    "model.attention_kernel": ("auto", "flash_attn_4", "varlen", "sdpa"),
}

DURATION = ("days", "hours", "minutes", "seconds")
DURATIONS = ("trainer.max_time", "trainer.val_check_interval", "stop.time_limit")


def check_ranges(config: Namespace) -> None:
    """Checks every value of a command's parsed arguments.

    Raises:
        UserError: for the first bad value: its name, the value, what it must be.
    """
    for key, values in _given(config, RANGES):
        for value in values:
            if isinstance(value, (int, float)) and not RANGES[key].holds(value):
                raise UserError(f"{key} is {value}; {RANGES[key]}.")
    for key, values in _given(config, CHOICES):
        for value in values:
            if isinstance(value, (str, int)) and value not in CHOICES[key]:
                named = ", ".join(dict.fromkeys(map(str, CHOICES[key])))
                raise UserError(f"{key} is {value!r}; it must be one of {named}.")
    for key, value in config.items():
        if ".init_args." in key and not key.startswith(STRATEGY):  # of a class that is not ours, whose "" may mean much
            continue
        if value == "":
            raise UserError(f"{key} is empty; give a value, or null for none.")
        if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
            raise UserError(f"{key} is {value}; it must be a finite number, of at most 2**53.")
    for key in DURATIONS:
        _check_duration(key, config.get(key))
    _check_devices(config.trainer.devices)
    _check_together(config)


def _given(config: Namespace, table: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for key in table:
        value = config.get(key)
        if value is not None:
            yield key, list(value) if isinstance(value, (list, tuple)) else [value]


def _check_duration(key: str, value: Any) -> None:
    """days:hours:minutes:seconds, or its parts by name, as Lightning's Timer reads them."""
    duration: timedelta | None = None
    if isinstance(value, str):
        parts = value.split(":")
        if len(parts) == len(DURATION) and all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts):
            duration = timedelta(**{name: int(part) for name, part in zip(DURATION, parts, strict=True)})
    elif isinstance(value, dict):
        with suppress(TypeError, OverflowError):
            duration = timedelta(**value)
    elif isinstance(value, timedelta):
        duration = value
    else:
        return
    if duration is None or duration <= timedelta():
        raise UserError(f"{key} is {value!r}; it must be {':'.join(DURATION)} above zero, 00:23:30:00 for example.")


def _check_devices(devices: Any) -> None:
    if devices in ("auto", -1, "-1"):
        return
    parsed = devices
    if isinstance(devices, str) and re.fullmatch(r"\d+(,\d+)*,?", devices):
        parsed = [int(part) for part in devices.strip(",").split(",")] if "," in devices else int(devices)
    number = isinstance(parsed, int) and 1 <= parsed <= 1024
    several = isinstance(parsed, list) and parsed and len(set(parsed)) == len(parsed) and min(parsed) >= 0
    if not (number or several):
        raise UserError(
            f"trainer.devices is {devices!r}; it must be the processes of a node, 1 to 1024, a list of different GPUs "
            "such as [0, 1], or auto."
        )


def _check_together(config: Namespace) -> None:
    trainer, model = config.trainer, config.model
    chosen = trainer.strategy.class_path if isinstance(trainer.strategy, Namespace) else trainer.strategy
    if not isinstance(trainer.strategy, Namespace) or not _is_ours(chosen):
        raise UserError(
            f"trainer.strategy is {chosen}, which cannot hold this model; leave it out, or give "
            "src.strategies.DeepSpeedSPStrategy."
        )
    options = trainer.strategy.init_args
    if not options.zero_optimization:
        raise UserError(
            f"{STRATEGY}zero_optimization is false; it must be true: stage says what ZeRO shards, 0 for nothing "
            "(--trainer.strategy.stage=0)."
        )
    check_stage(options.stage, str(trainer.precision))
    if model.min_learning_rate > model.learning_rate:
        raise UserError(
            f"model.min_learning_rate is {model.min_learning_rate}; it must be at most model.learning_rate "
            f"{model.learning_rate}: lower it."
        )
    if not config.data.train_files:
        raise UserError("data.train_files is empty; give the files to train on: --data.train_files '[train.jsonl]'.")
    batch = options.logging_batch_size_per_gpu
    if isinstance(batch, str) and batch != "auto":
        raise UserError(f"{STRATEGY}logging_batch_size_per_gpu is {batch!r}; it must be a number of rows, or auto.")
    parse_size(config.export.max_shard_size)
    if trainer.barebones:
        raise UserError("trainer.barebones is true, which leaves no checkpoints; it must be false.")
    if options.timeout is not None and options.timeout <= timedelta():
        raise UserError(f"{STRATEGY}timeout is {options.timeout}; it must be above zero, 0:30:00 for example.")


def _is_ours(class_path: str) -> bool:
    return class_path == STRATEGY_CLASS or issubclass(resolve_name(class_path), resolve_name(STRATEGY_CLASS))
