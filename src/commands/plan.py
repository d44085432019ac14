"""`plan`: does a config's run fit, how long does it take, what does it wait for; from the config alone."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from src.commands.early import read
from src.commands.outputs import PICTURES, check_output
from src.commands.planned import plan_of
from src.commands.writable import unwritable
from src.disk.space import named_if_full
from src.errors import UserError
from src.planner.cluster import Cluster, read_cluster
from src.planner.picture import draw, write_trace
from src.planner.plan import Plan
from src.planner.report import as_json, scale_text, search_text, text
from src.planner.search import nearest, scale, search


class PlanCLI:
    """Exits with 1 where the run does not fit, with 2 where the question is wrong."""

    name = "plan"
    parser: ArgumentParser
    plan: Plan

    def __init__(self, args: Sequence[str]) -> None:
        self.parser, config = read(self.name, args)
        if config is None:
            from src.commands.config_command import parse

            self.parser, config = parse(self.name, args)
        self.config = config
        self.run_command()

    def run_command(self) -> None:
        config = self.config
        try:
            check_output("--trace", config.trace)
            check_output("--picture", config.picture, PICTURES)
            if config.picture and find_spec("matplotlib") is None:
                raise UserError("--picture needs matplotlib: pip install matplotlib, or the extra `demo`.")
            cluster = read_cluster(config.cluster) if config.cluster else Cluster()
            self.plan = plan_of(config, cluster)
        except UserError as error:
            self.parser.error(str(error))
        self._answer(config, cluster)

    def _answer(self, config: Namespace, cluster: Cluster) -> None:
        settings, data = self.plan.settings, self.plan.data
        change = nearest(settings, cluster, data) if not self.plan.fits else None
        best = (
            search(
                settings,
                cluster,
                data,
                lambda rates, count: tqdm(rates, "search", count, disable=None),
                nodes=config.search_nodes,
            )
            if config.search
            else None
        )
        sizes = scale(settings, cluster, data) if config.scale else None
        if config.json:
            answer = as_json(self.plan) | {"unwritable": unwritable(config)}
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
            print(text(self.plan, config.explain))
            for problem in unwritable(config):
                print(f"from here: {problem}")
            if change:
                print(f"The nearest that fits: {change[0]}\n  {change[1].verdict}")
            elif not self.plan.fits:
                print(
                    "No combination of up to three changes of offload, batch, SP, shards, saves and nodes (up to four "
                    "times as many) fits."
                )
            for answered in (best is not None and search_text(best, settings), sizes is not None and scale_text(sizes)):
                if answered:
                    print(f"\n{answered}")
        if config.trace:
            with named_if_full(Path(config.trace)):
                write_trace(config.trace, self.plan.time.spans)
        if config.picture:
            with named_if_full(Path(config.picture)):
                draw(config.picture, self.plan.time.spans, f"One micro-step, simulated: {settings.options()}")
        if not self.plan.fits:
            raise SystemExit(1)


class _Silent(PlanCLI):
    def _answer(self, config: Namespace, cluster: Cluster) -> None:
        """Nothing: the plan is there."""


def plan_file(config: str | Path, *arguments: str) -> Plan:
    """The plan of a config file, on the guide's cluster unless `arguments` name another."""
    return _Silent(["--config", str(config), *arguments]).plan


def verdict(config: str | Path, *arguments: str) -> str:
    """The plan's one line, as the head of each config has it."""
    return plan_file(config, *arguments).verdict
