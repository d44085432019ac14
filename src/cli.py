"""The commands, `python -m src.cli COMMAND ...`: the wiring, no more."""

import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pkgutil import resolve_name
from typing import Any

from src.commands.early import read
from src.commands.options import OF_FUNCTIONS, options_of
from src.commands.quiet import BesideBars, log_our_warnings, silence
from src.errors import UserError
from src.launcher import is_first_process
from src.strategies.early_ranks import start, wait

# Each command imports its heavy libraries itself, so that --help and refusals answer at once.

USAGE = """usage: python -m src.cli COMMAND [--help] [arguments]

  fit         train, from a config file:  fit --config configs/tiny_cpu.yaml [--ckpt_path last]
  validate    loss on the validation data:  validate --config ... [--ckpt_path DIR]
  plan        does it fit, how long, what does it wait for:  plan --config ... [--explain] [--json] [--search] [--scale]
              [--cluster FILE] [--trace FILE] [--picture FILE]
  check-data  what is wrong with the data, and what it comes to:  check-data --config ... [--show N] [--html FILE]
  rehearse    one rank of the whole job on one GPU, without a network:  rehearse --config ... [--steps N]
  preflight   each node looked at, and what the cluster measures:  srun ... preflight --config ... [--write FILE]
  export      a checkpoint to a Hugging Face directory:  export --ckpt CKPT --out DIR
  verify      our logits, loss and gradients against transformers':  verify --model DIR
              or its names, shapes, dtypes and files against the published layout:  verify --model DIR --layout-only
"""


COMMANDS = {
    "fit": "src.commands.training.TrainingCLI",
    "validate": "src.commands.training.TrainingCLI",
    "plan": "src.commands.plan.PlanCLI",
    "check-data": "src.commands.check_data.CheckDataCLI",
    "preflight": "src.commands.preflight.PreflightCLI",
    "rehearse": "src.commands.rehearse.RehearseCLI",
    "export": "src.commands.export.export",
    "verify": "src.commands.verify.verify",
}


def _show_our_log() -> None:
    """Shows the log of the project's own loggers, from the first process only."""
    ours = logging.getLogger("src")
    if not ours.handlers:
        handler = BesideBars()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        ours.addHandler(handler)
    ours.setLevel(logging.INFO if is_first_process() else logging.WARNING)


def _let_segments_grow() -> None:
    """Lets PyTorch's memory segments grow: segments of fixed size fill a GPU long before its tensors do, and are then
    freed and allocated again in every step (benchmarks/RESULTS.md, "Four GPUs of one host"). The user's setting
    wins."""
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # read when CUDA is first used


def _spelled_out(command: str, args: list[str]) -> list[str]:
    """Lets a switch stand alone, `--layout-only` for `--layout_only=true`, which is what jsonargparse reads."""
    switches = [option.name for option in options_of(command) if option.type is bool]
    alone = {f"--{spelled}": f"--{name}" for name in switches for spelled in (name, name.replace("_", "-"))}
    followed = [*args[1:], "--"]
    return [
        f"{alone[arg]}=true" if arg in alone and after.startswith("--") else arg
        for arg, after in zip(args, followed, strict=True)
    ]


def _command(name: str) -> Callable[..., Any]:
    with redirect_stdout(sys.stderr):  # DeepSpeed prints on import; --json and --print_config must stay parseable
        command: Callable[..., Any] = resolve_name(name)
    for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric")):
        logger.handlers = [BesideBars() for _ in logger.handlers]
    log_our_warnings()
    return command


def _nobody_reads() -> bool:
    """Whether whoever reads our output has ended, as `head` does."""
    output = select.poll()
    output.register(sys.stdout, 0)
    return bool(output.poll(0))


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command; `args` are the command line's by default."""
    command, *rest = (sys.argv[1:] if args is None else args) or [""]
    if command not in COMMANDS:
        print(USAGE, end="")
        if command not in ("-h", "--help"):
            raise SystemExit(f"error: unknown command {command!r}")
        return
    _show_our_log()
    silence()
    if command in ("fit", "validate", "rehearse"):
        _let_segments_grow()
    if command in OF_FUNCTIONS:
        rest = _spelled_out(command, rest)
    _, config = read(command, rest)
    if command in OF_FUNCTIONS:
        from jsonargparse import auto_cli

        from src.commands.one_line import OneLineParser

        prog = f"python -m src.cli {command}"
        auto_cli(_command(COMMANDS[command]), args=rest, as_positional=False, prog=prog, parser_class=OneLineParser)
    elif command in ("fit", "validate"):
        devices = str(config.trainer.devices) if config is not None and config.trainer.num_nodes == 1 else ""
        if args is None and devices.isdecimal():
            start("src.cli", sys.argv[1:], int(devices))
        training = _command(COMMANDS[command])
        wait()
        training([command, *rest] if args is not None else None)
    else:
        _command(COMMANDS[command])(rest)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except UserError as error:  # of anything else the traceback is wanted
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
