"""`plan`: does a config's run fit, how long does it take, what does it wait for; from the config alone."""

import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from src.commands.early import read
from src.commands.outputs import PICTURES, check_output, writes
from src.commands.planned import plan_of
from src.commands.writable import unwritable
from src.errors import UserError
from src.planner.picture import draw, write_trace
from src.planner.plan import Plan
from src.planner.report import as_json, scale_text, search_text, text
from src.planner.search import nearest, scale, search

NONE_NEAR = (
    "No combination of up to three changes of offload, batch, SP, shards, saves and nodes (up to four times as many) "
    "fits."
)


class PlanCLI:
    """Exits with 1 where the run does not fit, with 2 where the question is wrong.

    Args:
        quiet: make the plan and leave it at that.
    """

    name = "plan"
    parser: ArgumentParser

    def __init__(self, args: Sequence[str], quiet: bool = False) -> None:
        self.parser, config = read(self.name, args)
        if config is None:
            from src.commands.config_command import parse

            self.parser, config = parse(self.name, args)
        self.config = config
        try:
            check_output("--trace", config.trace)
            check_output("--picture", config.picture, PICTURES)
            if config.picture and find_spec("matplotlib") is None:
                raise UserError("--picture needs matplotlib: pip install matplotlib, or the extra `demo`.")
            self.plan = plan_of(config)
        except UserError as error:
            self.parser.error(str(error))
        if not quiet:
            self._answer(config, self.plan)

    def _answer(self, config: Namespace, plan: Plan) -> None:
        settings, asked = plan.settings, (plan.settings, plan.cluster, plan.data)
        change = None if plan.fits else nearest(*asked)
        best = search(*asked, progress=_bar, nodes=config.search_nodes) if config.search else None
        sizes = scale(*asked) if config.scale else None
        if config.json:
            answer = as_json(plan) | {"unwritable": unwritable(config)}
            if change:
                answer["nearest"] = {"change": change[0], "verdict": change[1].verdict}
            for key, plans in (("search", best), ("scale", sizes)):
                if plans is not None:
                    answer[key] = [
                        as_json(p) | {"options": p.settings.options(), "arguments": p.settings.arguments(settings)}
                        for p in plans
                    ]
            print(json.dumps(answer, indent=2))
        else:
            print(text(plan, config.explain))
            for problem in unwritable(config):
                print(f"from here: {problem}")
            if not plan.fits:
                print(f"The nearest that fits: {change[0]}\n  {change[1].verdict}" if change else NONE_NEAR)
            if best is not None:
                print(f"\n{search_text(best, settings)}")
            if sizes is not None:
                print(f"\n{scale_text(sizes)}")
        if config.trace:
            with writes("--trace", config.trace):
                write_trace(config.trace, plan.time.spans)
        if config.picture:
            with writes("--picture", config.picture):
                draw(config.picture, plan.time.spans, f"One micro-step, simulated: {settings.options()}")
        if not plan.fits:
            raise SystemExit(1)


def _bar(rates: Iterable[float], count: int) -> Iterable[float]:
    return tqdm(rates, "search", count, disable=None)


def plan_file(config: str | Path, *arguments: str) -> Plan:
    """The plan of a config file, on the guide's cluster unless `arguments` name another."""
    return PlanCLI(["--config", str(config), *arguments], quiet=True).plan


def verdict(config: str | Path, *arguments: str) -> str:
    """The plan's one line, as the head of each config has it."""
    return plan_file(config, *arguments).verdict
