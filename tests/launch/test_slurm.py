"""The scripts under a real slurmctld with two nodes on this machine: a preempted run, and a node that is not as it
should be."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launch.cluster import ROOT, SlurmCluster, why_not

reason = why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

NODES = ["--nodes=2", "--ntasks-per-node=1", "--gres=none", "--mem=0"]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    slurm = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    slurm.start()
    slurm.environment |= {
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    yield slurm
    slurm.stop()


def arguments(inputs: Path, root: Path, *more: str) -> list[str]:
    return [
        "configs/tiny_cpu.yaml",
        "--trainer.num_nodes=2",
        "--trainer.devices=1",
        f"--trainer.default_root_dir={root}",
        "--trainer.enable_progress_bar=false",
        "--trainer.limit_val_batches=0",
        "--trainer.max_steps=5",
        f"--model.pretrained={inputs}/model",
        f"--data.tokenizer={inputs}/model",
        f"--data.train_files=[{inputs}/train.jsonl]",
        "--data.val_files=[]",
        f"--data.cache_dir={inputs}/cache",
        "--data.max_length=256",
        "--data.num_workers=1",
        "--checkpoint.every_n_train_steps=0",
        *more,
    ]


def losses(root: Path) -> dict[int, float]:
    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def test_a_preempted_run_saves_requeues_itself_and_ends_as_if_it_had_not_been(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path
) -> None:
    script = [*NODES, "scripts/slurm/fit.sbatch"]
    reached = tmp_path / "reached"
    pause = [
        "--trainer.callbacks+=tests.launch.pause.Pause",
        "--trainer.callbacks.step=3",
        f"--trainer.callbacks.reached={reached}",
    ]
    log = tmp_path / "log"
    first = cluster.submit(
        f"--output={log}", *script, *arguments(inputs, tmp_path / "preempted", *pause), PREFLIGHT="0"
    )
    cluster.wait_until(reached.exists, f"step 3 of {log}")
    cluster.run("scancel", "--signal=USR1", first)
    whole_log = tmp_path / "whole.log"
    second = cluster.submit(f"--output={whole_log}", *script, *arguments(inputs, tmp_path / "whole"), PREFLIGHT="0")
    for job, of_job in ((second, whole_log), (first, log)):
        cluster.wait_until(lambda job=job: cluster.state(job)["JobState"] in ("COMPLETED", "FAILED"), f"job {job}")
        assert cluster.state(job)["JobState"] == "COMPLETED", of_job.read_text()[-3000:]
    said = log.read_text()
    assert cluster.state(first)["Restarts"] == "1" and cluster.state(second)["Restarts"] == "0"
    assert 'to be continued: {"step": 3, "why": "SIGUSR1"}' in said and f"job {first}, start 1, on n[1-2]" in said
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "preempted")
    assert len(whole) > 4 and resumed == whole
    checkpoints = tmp_path / "preempted/checkpoints"
    assert (
        os.readlink(checkpoints / "last.ckpt") == f"step={len(whole)}.ckpt" and (checkpoints / "step=3.ckpt").is_dir()
    )
    assert not list(ROOT.glob(".stopped-*"))


def test_a_node_with_other_weights_is_named_and_nothing_is_started(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path
) -> None:
    """Each node has a local disk of its own for the weights: the working directory, here."""
    for node in ("n1", "n2"):
        shutil.copytree(inputs / "model", tmp_path / node / "model")
    config = tmp_path / "n2/model/config.json"
    config.write_text(config.read_text() + " ")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nexport PYTHONPATH={ROOT}\ncd {tmp_path}/$SLURMD_NODENAME\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    log = tmp_path / "log"
    values = arguments(inputs, tmp_path / "run", "--model.pretrained=model")
    values[0] = str(ROOT / values[0])
    job = cluster.submit(f"--output={log}", *NODES, "scripts/slurm/fit.sbatch", *values, PYTHON=str(python))
    cluster.wait_until(lambda: cluster.state(job)["JobState"] in ("COMPLETED", "FAILED"), f"job {job}")
    said = log.read_text()
    assert cluster.state(job)["JobState"] == "FAILED"
    assert "n2: weights: config.json is " in said and "0: n1: " not in said
    assert "preflight: 1 of 2 nodes failed: n2" in said and "sbatch --exclude=n2" in said
    assert "error: fit was not started" in said and not (tmp_path / "run/checkpoints").exists()
