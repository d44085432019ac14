"""What one rank cannot read or write ends all, with its reason, before they wait for each other."""

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from src.callbacks.export_at_end import ExportAtEnd
from src.datamodules import SFTDataModule, sft
from src.strategies import DeepSpeedSPStrategy, checkpointing, deepspeed_sp, reshard
from src.strategies.fail_together import fail_together

from .spawn import run_distributed


def on_rank(rank: int, error: Exception) -> Callable[..., Any]:
    """A function that fails on one rank and does nothing on the others."""

    def function(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == rank:
            raise error

    return function


BROKEN = OSError(errno.EIO, "Input/output error", "/nfs/file")


def strategy(folder: Path, fitting: bool = False) -> Any:
    made: Any = DeepSpeedSPStrategy()
    trainer = SimpleNamespace(ckpt_path=str(folder), state=SimpleNamespace(fn="fit" if fitting else "validate"))
    made._lightning_module = SimpleNamespace(trainer=trainer, model=None)
    return made


def put(module: Any, **names: Any) -> None:
    """Until the process ends."""
    for name, value in names.items():
        assert hasattr(module, name)
        setattr(module, name, value)


def load_weights(folder: Path) -> None:
    put(deepspeed_sp, HFDirectorySource=on_rank(1, BROKEN))
    made = strategy(folder)
    made._load = lambda model, source: None
    made.load(None, str(folder))


def load_weights_that_one_rank_cannot_read_to_the_end(folder: Path) -> None:
    put(deepspeed_sp, HFDirectorySource=lambda directory: None)
    made = strategy(folder)
    made._load = on_rank(1, BROKEN)
    made.load(None, str(folder))


def load_a_checkpoint_that_one_rank_does_not_see(folder: Path) -> None:
    if dist.get_rank() == 0:
        (folder / "latest").touch()
        (folder / "manifest.json").touch()
    dist.barrier()
    made = strategy(folder)
    made.accept_unlisted = True
    put(deepspeed_sp, ZeroCheckpointSource=on_rank(1, BROKEN), PerExpert=lambda source: source)
    made._load = lambda model, source: None
    made.load(None, str(folder if dist.get_rank() == 0 else folder / "not mounted"))


def resume(folder: Path) -> None:
    put(checkpointing, client_state=on_rank(1, BROKEN))
    strategy(folder).load_checkpoint(folder)


def resume_from_shards(folder: Path) -> None:
    put(checkpointing, ZeroCheckpointSource=on_rank(1, BROKEN))
    strategy(folder, fitting=True).load_model_state_dict({})


def resume_from_shards_that_end(folder: Path) -> None:
    put(reshard, _restore=on_rank(1, BROKEN))
    put(reshard, weights_follow=lambda *args: fail_together())
    engine: Any = SimpleNamespace(zero_nvme_offload_optimizer=lambda: False)
    reshard.restore(engine, None, SimpleNamespace(step=1))  # type: ignore[arg-type]


def export(folder: Path) -> None:
    if dist.get_rank() == 1:
        folder = Path("/proc/self/fd")  # has files
    trainer: Any = SimpleNamespace(strategy=strategy(folder), callbacks=[])
    ExportAtEnd(str(folder / "out" if dist.get_rank() == 0 else folder)).setup(trainer, None, "fit")  # type: ignore[arg-type]


def open_data(folder: Path, broken: str, rank: int) -> None:
    data: Any = SFTDataModule(train_files=[str(folder / "chats.jsonl")])
    lead = SimpleNamespace(broadcast=_broadcast, fail_together=fail_together)
    state = SimpleNamespace(fn="fit")
    data.trainer = SimpleNamespace(strategy=lead, is_global_zero=dist.get_rank() == 0, state=state)
    data._prepare = on_rank(rank, BROKEN) if broken == "prepare" else lambda files: "fingerprint"
    put(sft, open_built=on_rank(rank, BROKEN) if broken == "open" else lambda *args: None)
    put(sft, expand=lambda files: files)
    data.prepare_data()
    data._open(data.train_files)


def _broadcast(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def prepare_data(folder: Path) -> None:
    open_data(folder, "prepare", 1)


def prepare_data_first(folder: Path) -> None:
    open_data(folder, "prepare", 0)


def open_prepared_data(folder: Path) -> None:
    open_data(folder, "open", 1)


def mistake(folder: Path) -> None:
    with fail_together():
        on_rank(0, ZeroDivisionError("a bug"))()


READS = (
    *(load_weights, load_weights_that_one_rank_cannot_read_to_the_end, load_a_checkpoint_that_one_rank_does_not_see),
    *(resume, resume_from_shards, resume_from_shards_that_end, prepare_data, prepare_data_first, open_prepared_data),
)


def outcomes(folder: Path) -> dict[str, str]:
    """This rank's error of each."""
    dist.init_process_group("gloo")
    found = {}
    for work in (*READS, export, mistake):
        own = folder / work.__name__
        own.mkdir(exist_ok=True)
        try:
            work(own)
            found[work.__name__] = "nothing"
        except Exception as error:
            found[work.__name__] = f"{type(error).__name__}: {error}"
        dist.barrier()  # met elsewhere by a rank that is still in the work
    dist.destroy_process_group()
    return found


def test_an_error_of_one_rank_is_all_ranks(tmp_path: Path) -> None:
    first, second = run_distributed(outcomes, 2, tmp_path)
    for work in READS:
        failing = 0 if work is prepare_data_first else 1
        said = f"UserError: rank {failing} failed: [Errno 5] Input/output error: '/nfs/file'"
        assert (first[work.__name__], second[work.__name__]) == (said, said), work
    taken = "/proc/self/fd already exists and is not empty: give another directory, or remove it"
    assert (first["export"], second["export"]) == (f"UserError: rank 1 failed: {taken}", f"UserError: {taken}")
    # A mistake of ours keeps its traceback where it is made.
    assert (first["mistake"], second["mistake"]) == (
        "ZeroDivisionError: a bug",
        "OtherRankFailed: rank 0 failed: a bug",
    )
