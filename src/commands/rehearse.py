"""`rehearse`: one rank of the whole job on one GPU, its memory and its work measured beside the plan's."""

from dataclasses import replace

import torch
from lightning.pytorch.cli import LightningArgumentParser

from src.callbacks.out_of_memory import OutOfMemory
from src.commands.config_command import ConfigCommand
from src.commands.plan import plan_of
from src.planner.cluster import Cluster, read_cluster
from src.planner.plan import Plan, make_plan
from src.planner.settings import GIB
from src.rehearsal.job import Job, Measured, rehearse

ENDLESS = 1e9  # GB/s


class RehearseCLI(ConfigCommand):
    """The job's own step on rank 0 of its world: this rank's partition of the model, its rows, its buffers on the host
    and the GPU. What other ranks would send is made here, so nothing of it says what the network does."""

    name = "rehearse"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--steps", type=int, default=2, help="optimizer steps; the first compiles and is not timed")
        parser.add_argument("--cluster", type=str | None, default=None, help="the machines: as plan's")
        parser.add_argument("--document_length", type=int | None, default=None, help="as plan's")

    def run_command(self) -> None:
        config = self.config
        trainer = config.trainer
        if trainer.accelerator not in ("cpu", "auto") and not torch.cuda.is_available():
            self.parser.error(f"trainer.accelerator is {trainer.accelerator!r} and no GPU can be used here")
        try:
            plan = plan_of(config, read_cluster(config.cluster) if config.cluster else Cluster())
        except ValueError as error:
            self.parser.error(str(error))
        config.model.from_scratch = True  # random weights of this rank's part alone
        made = self.parser.instantiate_classes(config)
        s = plan.settings
        length = min(int(s.document), s.max_length)
        rest = s.max_length % length
        job = Job(
            world=s.world,
            sp=s.sp,
            batch_size=s.batch_size,
            accumulate=s.accumulate,
            documents=[length] * (s.max_length // length) + [rest] * (rest > 0),
            vocab=s.sizes.vocab,
        )
        measured = rehearse(
            job,
            made.model,
            config.steps,
            [OutOfMemory()],
            accelerator=trainer.accelerator,
            strategy=made.trainer.strategy,
            precision=trainer.precision,
            gradient_clip_val=trainer.gradient_clip_val,
        )
        print(report(plan, measured))


def report(plan: Plan, measured: Measured) -> str:
    s = plan.settings
    # No save is written here and no network is waited for.
    alone = make_plan(
        s.but(async_save=False),
        replace(plan.cluster, nccl_inter_node_gb_s=ENDLESS, nccl_intra_node_gb_s=ENDLESS),
        plan.data,
    )
    rows = []
    if measured.allocated:
        rows += [
            ("GPU memory of tensors, GiB", f"{measured.allocated / GIB:.1f}", f"{plan.allocated / GIB:.1f}"),
            ("  with PyTorch's cache", f"{measured.reserved / GIB:.1f}", ""),
        ]
    rows.append(("host memory, GiB", f"{measured.host / GIB:.1f}", f"{alone.host_total / s.gpus / GIB:.1f}"))
    micro = alone.time.micro
    if measured.micro is not None:
        rows.append(("a micro-step, s", f"{measured.micro:.2f}", f"{micro:.2f}"))
    rows.append(("the last one and the optimizer, s", f"{measured.last:.2f}", f"{micro + alone.time.optimizer:.2f}"))
    lines = [
        f"rank 0 of {s.world} (DP {s.dp} x SP {s.sp}), everything but the network:",
        "",
        f"  {'':36}{'here':>8}{'planned':>10}",
        *(f"  {name:36}{here:>8}{there:>10}" for name, here, there in rows),
        "",
        f"losses {', '.join(f'{loss:.2f}' for loss in measured.losses)}: of random weights, and not the job's",
    ]
    return "\n".join(lines)
