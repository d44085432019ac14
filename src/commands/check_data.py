"""`check-data`: everything wrong with a config's data, and its statistics."""

import os
import sys
from pathlib import Path

from src.commands.checks import check_data_fits_model, parallel_dims
from src.commands.config_command import ConfigCommand
from src.commands.outputs import check_output, writes
from src.datamodules import SFTDataModule
from src.datamodules.limits import Limits
from src.datamodules.report.collect import check
from src.datamodules.report.html import page
from src.datamodules.report.text import report_lines, verdict
from src.datamodules.tokenizer import load_tokenizer
from src.errors import UserError
from src.models.deepseek_v3 import load_config


class CheckDataCLI(ConfigCommand):
    """Exits with 1 where the data is wrong."""

    name = "check-data"

    def run_command(self) -> None:
        settings = self.config
        try:
            check_output("--html", settings.html)
            data = SFTDataModule(**settings.data.as_dict())
            data.tokenizer = load_tokenizer(settings.data.tokenizer or settings.model.pretrained)
        except UserError as error:  # without these nothing can be read
            raise SystemExit(f"check-data: {error}") from None
        problems: list[str] = []
        pretrained, replicas = settings.model.pretrained, None
        if (Path(pretrained) / "config.json").is_file():  # the model may be on the cluster alone
            try:
                check_data_fits_model(data, load_config(pretrained), pretrained)
            except UserError as error:
                problems.append(str(error))
        else:
            print(f"{pretrained} has no config.json here: max_length and tokenizer are not compared with the model's")
        try:
            dims = parallel_dims(settings.trainer)
            replicas = None if dims is None else dims.dp
        except UserError as error:
            problems.append(str(error))
        trainer = settings.trainer
        reports = check(data, replicas, trainer.accumulate_grad_batches, settings.show, Limits.of(trainer))
        reports[0].problems[:0] = problems
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        wrong = sum(report.wrong for report in reports)
        print("\n".join([verdict(wrong), *report_lines(reports, data.tokenizer, colour)]))
        if settings.html:
            with writes("--html", settings.html):
                Path(settings.html).write_text(page(reports, data.tokenizer, "check-data"), encoding="utf-8")
        if wrong:
            raise SystemExit(1)
