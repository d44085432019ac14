"""What no run can mean is refused before anything is loaded, the same by every command."""

import inspect
import re
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy

from src.callbacks.export_at_end import ExportAtEnd
from src.callbacks.rounding_kept import RoundingKept
from src.callbacks.samples import Samples
from src.callbacks.step_checkpoint import StepCheckpoint
from src.callbacks.stop import Stop
from src.callbacks.watchdog import Watchdog
from src.callbacks.weights_checkpoint import WeightsCheckpoint
from src.commands.ranges import RANGES
from src.datamodules import SFTDataModule
from src.errors import UserError
from src.models.kernels import ATTENTION
from src.models.sft_module import SFTModule
from src.strategies import DeepSpeedSPStrategy
from src.strategies.zero_limits import STRATEGY
from tests.command import ROOT, run
from tests.test_configs import Parse

GROUPS: dict[str, list[type]] = {
    "trainer.": [pl.Trainer],
    STRATEGY: [DeepSpeedStrategy, DeepSpeedSPStrategy],
    "model.": [SFTModule],
    "data.": [SFTDataModule],
    "checkpoint.": [StepCheckpoint],
    "weights.": [WeightsCheckpoint],
    "export.": [ExportAtEnd],
    "stop.": [Stop],
    "samples.": [Samples],
    "watchdog.": [Watchdog],
    "rounding.": [RoundingKept],
}
# Whose numbers are read as something else, or inside a list or mapping.
OTHERWISE = {"trainer.devices", "trainer.precision", "trainer.max_time", f"{STRATEGY}parallel_devices"}


def parse(*args: str) -> Any:
    return Parse(["--config", str(ROOT / "configs/tiny_cpu.yaml"), *args]).config


def _numeric(annotation: Any) -> bool:
    return annotation in (int, float) or any(_numeric(part) for part in get_args(annotation))


def test_every_number_has_a_range() -> None:
    found = {
        f"{group}{name}"
        for group, classes in GROUPS.items()
        for cls in classes
        for name, parameter in inspect.signature(cls).parameters.items()
        if _numeric(parameter.annotation)
    }
    own = {"show", "search_nodes", "document_length", "gpu_memory", "steps", "seed_everything"}
    assert found - OTHERWISE - RANGES.keys() == set() and RANGES.keys() - own <= found
    assert len(found) > 60


REFUSED = [
    ("model.weight_decay=-0.1", r"model\.weight_decay is -0\.1; it must be in \[0, 1\].*0 for none"),
    ("trainer.gradient_clip_val=-1", r"trainer\.gradient_clip_val is -1; it must be in \[0, 1e6\].*0 to clip none"),
    ("model.learning_rate=.inf", r"model\.learning_rate is inf; it must be in \[0, 1\]"),
    ("model.learning_rate=.nan", r"model\.learning_rate is nan"),
    ("model.learning_rate=1e30", r"model\.learning_rate is 1e\+30"),
    ("model.min_learning_rate=0.5", r"min_learning_rate is 0\.5; it must be at most model\.learning_rate 0\.003"),
    ("model.betas=[0.9,1.0]", r"model\.betas is 1\.0; it must be in \[0, 1\)"),
    ("model.betas=[-0.1,0.9]", r"model\.betas is -0\.1"),
    ("model.mtp_loss_weight=-1", r"mtp_loss_weight is -1"),
    ("model.aux_loss_alpha=.nan", r"aux_loss_alpha is nan"),
    ("model.experts_per_shard=0", r"experts_per_shard is 0; it must be in \[1"),
    ("model.attention_kernel=fast", r"attention_kernel is 'fast'; it must be one of auto, flash_attn_4"),
    ("model.pretrained=", r"model\.pretrained is empty"),
    ("trainer.accumulate_grad_batches=0", r"accumulate_grad_batches is 0; it must be in \[1, 65536\]"),
    ("trainer.accumulate_grad_batches=1000000", r"accumulate_grad_batches is 1000000"),
    ("trainer.log_every_n_steps=0", r"log_every_n_steps is 0; it must be in \[1"),
    ("trainer.strategy.zero_optimization=false", r".*zero_optimization is false; it must be true.*strategy\.stage=0"),
    ("trainer.val_check_interval=0", r"val_check_interval is 0"),
    ("trainer.val_check_interval=1.5", r"val_check_interval is 1\.5.*or a fraction in \(0, 1\]"),
    ("trainer.limit_train_batches=0", r"limit_train_batches is 0"),
    ("trainer.max_steps=0", r"max_steps is 0; it must be in \[1, 1e9\] or -1"),
    ("trainer.max_steps=-2", r"max_steps is -2"),
    ("trainer.max_epochs=0", r"max_epochs is 0"),
    ("trainer.max_time=5", r"max_time is '5'; it must be days:hours:minutes:seconds above zero"),
    ("trainer.max_time=00:00:00:00", r"max_time is '00:00:00:00'"),
    ("trainer.num_nodes=0", r"num_nodes is 0"),
    ("trainer.devices=0", r"devices is '0'; it must be the processes of a node"),
    ("trainer.devices=-3", r"devices is '-3'"),
    ("trainer.devices=[0,0]", r"devices is .*\[0, ?0\]"),
    ("trainer.devices=many", r"devices is 'many'"),
    ("trainer.accelerator=tpu", r"accelerator is 'tpu'; it must be one of auto, cpu, cuda, gpu"),
    ("trainer.precision=64-true", r"precision is '64-true'; it must be one of bf16-true, 32-true"),
    ("trainer.strategy=ddp", r"strategy is ddp, which cannot hold this model"),
    ("trainer.strategy=lightning.pytorch.strategies.DDPStrategy", r"strategy is .*DDPStrategy, which cannot hold"),
    ("trainer.strategy.stage=4", r"stage is 4; it must be in \[0, 3\]"),
    ("trainer.strategy.stage=-1", r"stage is -1"),
    ("trainer.strategy.sequence_parallel_size=0", r"sequence_parallel_size is 0"),
    ("trainer.strategy.reduce_bucket_size=0", r"reduce_bucket_size is 0"),
    ("trainer.strategy.timeout=0:00:00", r"timeout is 0:00:00; it must be above zero"),
    ("data.batch_size=0", r"data\.batch_size is 0; it must be in \[1, 65536\]"),
    ("data.max_length=1", r"data\.max_length is 1"),
    ("data.num_workers=-1", r"data\.num_workers is -1"),
    ("data.seed=-1", r"data\.seed is -1"),
    ("data.train_weights=[-1]", r"data\.train_weights is -1"),
    ("data.train_files=[]", r"data\.train_files is empty"),
    ("seed_everything=-1", r"seed_everything is -1"),
    ("checkpoint.keep=0", r"checkpoint\.keep is 0"),
    ("checkpoint.every_n_train_steps=-1", r"checkpoint\.every_n_train_steps is -1"),
    ("weights.keep=0", r"weights\.keep is 0"),
    ("stop.lead=.inf", r"stop\.lead is inf"),
    ("stop.time_limit=1h", r"stop\.time_limit is '1h'"),
    ("samples.temperature=-1", r"samples\.temperature is -1"),
    ("watchdog.minutes=1e30", r"watchdog\.minutes is 1e\+30"),
]


@pytest.mark.parametrize(("option", "message"), REFUSED, ids=[option for option, _ in REFUSED])
def test_what_makes_no_sense_is_refused(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(f"--{option}")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and re.match(f"error: .*{message}", line)


@pytest.mark.parametrize(
    "option",
    [
        "model.weight_decay=0",
        "model.learning_rate=0 --model.min_learning_rate=0",
        "trainer.gradient_clip_val=null",
        "trainer.max_steps=-1",
        "trainer.max_epochs=-1",
        "trainer.max_time=00:23:30:00",
        "trainer.devices=-1",
        "trainer.devices=[0,1]",
        "trainer.devices=0,1",
        "trainer.limit_val_batches=0",
        "trainer.limit_train_batches=0.5",
        "trainer.val_check_interval=00:01:00:00",
        "trainer.num_sanity_val_steps=-1",
        "trainer.precision=32",
        "trainer.strategy.stage=0",
        "data.val_files=[]",
        "seed_everything=true",
        "watchdog.minutes=0",
        "trainer.logger=TensorBoardLogger --trainer.logger.save_dir=here",  # with an empty prefix of its own
    ],
)
def test_what_makes_sense_is_taken(option: str) -> None:
    parse(*f"--{option}".split())


def test_bf16_without_zero_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    message = r"stage is 0 with trainer\.precision bf16-true: .*take one, or --trainer\.precision 32-true"
    with pytest.raises(SystemExit):
        parse("--trainer.strategy.stage=0", "--trainer.precision=bf16-true")
    assert re.search(message, capsys.readouterr().err)
    trainer = pl.Trainer(strategy=DeepSpeedSPStrategy(stage=0), precision="bf16-true", accelerator="cpu", logger=False)
    with pytest.raises(UserError, match=message):
        trainer.strategy.setup_environment()


def test_the_kernels_are_those_that_there_are() -> None:
    from src.commands.ranges import CHOICES

    assert set(CHOICES["model.attention_kernel"]) == {"auto", *ATTENTION}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.weight_decay=-1", "model.weight_decay is -1.0"),
        ("--trainer.accumulate_grad_batches=5000", "accumulate_grad_batches is 5000, but the 16 rows of an epoch fill"),
        (
            "--trainer.val_check_interval=17",
            "trainer.val_check_interval is 17, but an epoch has 16 micro-batches: lower",
        ),
        (
            "--trainer.limit_val_batches=0.05",
            "limit_val_batches is 0.05, less than one of the 16 micro-batches of val m",
        ),
    ],
)
def test_plan_check_data_and_fit_refuse_the_same(option: str, message: str, inputs: Path, tmp_path: Path) -> None:
    args = [
        *("--config=configs/tiny_cpu.yaml", option, f"--trainer.default_root_dir={tmp_path}"),
        *(f"--model.pretrained={inputs}/model", f"--data.tokenizer={inputs}/model", f"--data.cache_dir={tmp_path}/c"),
        *(f"--data.train_files=[{inputs}/train.jsonl]", "--data.val_files=null", "--data.max_length=256"),
        f"--data.val_sets={{m: [{inputs}/train.jsonl]}}",
        *("--trainer.devices=1", "--trainer.strategy.sequence_parallel_size=1", "--data.packing=false"),
    ]
    for command in ("plan", "check-data", "fit"):
        result = run(command, *args, check=False)
        assert result.returncode not in (0, None) and message in result.stdout + result.stderr, command
        assert "Traceback" not in result.stderr, command
    assert not (tmp_path / "checkpoints").exists()
