"""`rehearse`: runs one rank of the job on one GPU and compares its memory and time with the plan."""

import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from jsonargparse import Namespace

from src.callbacks.out_of_memory import OutOfMemory
from src.callbacks.progress import Progress
from src.commands.config_command import ConfigCommand
from src.commands.instances import errors_as_raised
from src.commands.mtp_weight import mtp_loss_weight
from src.commands.outputs import TRACES, check_output
from src.commands.planned import plan_of, row_lengths
from src.errors import UserError
from src.planner.cluster import HOST_PART
from src.planner.plan import Plan, make_plan
from src.planner.settings import Settings
from src.planner.streams import makespan
from src.preflight.node import usable_memory
from src.rehearsal.job import Job, Measured, rehearse
from src.units import GIB


class RehearseCLI(ConfigCommand):
    """Runs the job's own step as rank 0 of its world: its partition, its rows, its buffers on host and GPU. What other
    ranks would send is made locally, so it says nothing about the network."""

    name = "rehearse"

    def run_command(self) -> None:
        config, trainer = self.config, self.config.trainer
        if trainer.accelerator not in ("cpu", "auto") and not torch.cuda.is_available():
            self.parser.error(f"trainer.accelerator is {trainer.accelerator!r} and no GPU can be used here")
        try:
            check_own(config, cuda=trainer.accelerator != "cpu" and torch.cuda.is_available())
            plan = plan_of(config)
            if config.gpu_memory is not None:
                hold_to(config.gpu_memory, plan)
        except UserError as error:
            self.parser.error(str(error))
        s, needed = plan.settings, alone(plan).host_total / plan.settings.gpus
        margin = (1 - HOST_PART) * psutil.virtual_memory().total  # the machine's own
        available = usable_memory() - margin
        if needed > available:
            self.parser.error(
                f"a rank needs {needed / GIB:.0f} GiB of host memory by the plan, {available / GIB:.0f} are free here; "
                "a larger trainer.num_nodes makes a rank's part smaller"
            )
        if "OMP_NUM_THREADS" not in os.environ:  # of DeepSpeedCPUAdam: a rank's share of the machine
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // s.gpus))
        config.model.mtp_loss_weight = mtp_loss_weight(config.model)
        config.model.from_scratch = True  # random weights of this rank's part alone
        if s.reduce_dtype == "bf16":  # this process is not a node's only one
            trainer.strategy.init_args.reduce_node_size = s.gpus
        with errors_as_raised(self.parser):
            made = self.parser.instantiate_classes(config)
        job = Job(
            world=s.world,
            sp=s.sp,
            batch_size=s.batch_size,
            accumulate=s.accumulate,
            rows=rows_of(config, s),
            vocab=s.sizes.vocab_size,
        )
        # Its advice is a command for `plan`, which has no --steps.
        arguments = shlex.split(re.sub(r"(^| )--steps[ =]\S+", "", shlex.join(sys.argv[2:])))
        measured = rehearse(
            job,
            made.model,
            config.steps,
            [OutOfMemory(arguments), Progress()],
            Path(config.timeline) if config.timeline else None,
            accelerator=trainer.accelerator,
            strategy=made.trainer.strategy,
            precision=trainer.precision,
            gradient_clip_val=trainer.gradient_clip_val,
        )
        print(report(plan, measured, job.rows))


def check_own(config: Namespace, *, cuda: bool) -> None:
    """Raises UserError where --timeline or --gpu_memory cannot be what is asked. cuda: the rank runs on a GPU."""
    for option in ("timeline", "gpu_memory"):
        if config[option] is not None and not cuda:
            raise UserError(f"--{option} {config[option]} needs a GPU, and this rank runs on CPU: leave it out.")
    check_output("--timeline", config.timeline, TRACES)
    micro_steps = config.trainer.accumulate_grad_batches
    if config.timeline is not None and micro_steps < 3:
        raise UserError(
            f"--timeline {config.timeline} needs a micro-step that is neither a step's first nor its last: "
            f"trainer.accumulate_grad_batches is {micro_steps}; give 3 or more, or leave --timeline out."
        )


def hold_to(gib: float, plan: Plan) -> None:
    """Lets PyTorch take no more of this card than is left of `gib` GiB beside CUDA's context and NCCL.

    Raises:
        UserError: nothing is left, or more than the card has.
    """
    outside = sum(line.nbytes for line in plan.overhead if line.name in ("CUDA context", "NCCL"))
    card = torch.cuda.get_device_properties(0).total_memory
    if not 0 < gib * GIB - outside <= card:
        raise UserError(
            f"--gpu_memory is {gib:g}; it must be in ({outside / GIB:.1f}, {(outside + card) / GIB:.1f}]: "
            f"CUDA's context and NCCL take {outside / GIB:.1f} GiB, and this card has {card / GIB:.1f}."
        )
    torch.cuda.set_per_process_memory_fraction((gib * GIB - outside) / card)


def rows_of(config: Namespace, settings: Settings) -> list[list[int]]:
    """The lengths of each row's documents, as --rows asks.

    Raises:
        ValueError: the data's are asked for, and their files are not here.
    """
    longest = settings.max_length
    if config.rows == "data":
        return row_lengths(config)
    document = min(int(settings.document), longest)
    # The longest first, the shortest next: buffers that are kept by size show in the second micro-step.
    eighths = (8, 1, 7, 2, 6, 3, 5, 4) if config.rows == "spread" else (8,)
    totals = [max(1, longest * n // 8) for n in eighths]
    return [[document] * (n // document) + [n % document] * (n % document > 0) for n in totals]


def alone(plan: Plan, gather: float | None = None) -> Plan:
    """Without a save and loaders, with copies of `gather` bytes per second for a network, and even rows of experts."""
    cluster = plan.cluster
    if gather is not None:
        cluster = replace(cluster, copies=gather)
    return make_plan(plan.settings.but(async_save=False, num_workers=0, imbalance=1.0), cluster, plan.data)


def report(plan: Plan, measured: Measured, lengths: list[list[int]]) -> str:
    s, planned = plan.settings, alone(plan, measured.gather)
    shared = f", experts shared by {s.ep}" if s.ep > 1 else ""
    rows = []
    if measured.allocated:
        rows += [
            ("GPU memory of tensors, GiB", f"{measured.allocated / GIB:.1f}", f"{planned.allocated / GIB:.1f}"),
            ("  with PyTorch's cache", f"{measured.reserved / GIB:.1f}", ""),
            ("  while setting up", f"{measured.set_up / GIB:.1f}", ""),
        ]
    rows.append(("host memory, GiB", f"{measured.host / GIB:.1f}", f"{planned.host_total / s.gpus / GIB:.1f}"))
    n, last = s.accumulate, makespan(planned.time.spans)

    def seconds(value: float) -> str:
        return "" if s.cpu else f"{value:.2f}"  # no rates of a CPU are known

    if measured.micro is not None:
        rows.append(("a micro-step, s", f"{measured.micro:.2f}", seconds((n * planned.time.micro - last) / (n - 1))))
    what = "the last" if n > 1 else "the micro-step"
    rows.append((f"{what} and the optimizer, s", f"{measured.last:.2f}", seconds(last + planned.time.optimizer)))
    if measured.busy is not None:
        rows.append(("compute stream busy in a micro-step", f"{measured.busy[0]:.1%}", ""))
        rows.append(("  any stream; else it waits for the host", f"{measured.busy[1]:.1%}", ""))
    if measured.load is not None:
        rows.append(("the busiest expert's load", f"{measured.load:.1f} x", "1.0 x"))
    return "\n".join(
        [
            f"rank 0 of {s.world} (DP {s.dp} x SP {s.sp}{shared}), everything but the network:",
            "",
            f"  {'':40}{'here':>10}{'planned':>10}",
            *(f"  {name:40}{here:>10}{there:>10}" for name, here, there in rows),
            "",
            f"Rows of {described(lengths)}; the plan's are of {s.max_length:,} tokens, all full.",
            f"Gathers are copies at {measured.gather / 1e9:.0f} GB/s, and planned as such.",
            f"Losses {', '.join(f'{loss:.2f}' for loss in measured.losses)}: of random weights, and not the job's.",
        ]
    )


def described(rows: list[list[int]]) -> str:
    totals = [sum(row) for row in rows]
    shortest, longest = min(totals), max(totals)
    return f"{longest:,} tokens" if shortest == longest else f"{shortest:,} to {longest:,} tokens"
