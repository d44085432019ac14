"""The pages' commands under a real slurmctld with two nodes on this machine: the whole job, a preempted run, and a node
that is not as it should be."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command import run
from tests.launch.cluster import ROOT, SlurmCluster, why_not
from tests.test_pages import blocks, calls, lines, pasted, shape

reason = why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


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


SIZE = ["--nodes=2", "--ntasks-per-node=1", "--gres=none", "--mem=0"]  # this cluster's, in place of 32 nodes' GPUs


def config(inputs: Path, root: Path, **more: Any) -> str:
    """A config file of the tiny model on two nodes, in place of the pages' large ones."""
    settings = {
        "config": str(ROOT / "configs/tiny_cpu.yaml"),
        "trainer.num_nodes": 2,
        "trainer.devices": 1,
        "trainer.default_root_dir": str(root),
        "trainer.enable_progress_bar": False,
        "trainer.limit_val_batches": 0,
        "trainer.max_steps": 5,
        "model.pretrained": f"{inputs}/model",
        "data.tokenizer": f"{inputs}/model",
        "data.train_files": [f"{inputs}/train.jsonl"],
        "data.val_files": [],
        "data.cache_dir": f"{inputs}/cache",
        "data.max_length": 256,
        "data.num_workers": 1,
        "checkpoint.every_n_train_steps": 0,
        **more,
    }
    root.mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(root / "config.yaml")


def printed(page: str, start: str, substitutes: dict[str, str], folder: Path) -> list[list[str]]:
    """The words of each command of the page's block that has a line with `start`, as a shell makes them of the text."""
    (block,) = [text for text in blocks(ROOT / page) if start in text]
    commands = lines(block)
    for shown, value in substitutes.items():
        assert shown in "\n".join(commands), shown
        commands = [command.replace(shown, value) for command in commands]
    return [[word for word in words if word] for words in calls(commands, folder)]


def end(cluster: SlurmCluster, job: str, log: Path) -> str:
    """What a job has said when it is completed."""
    cluster.wait_until(lambda: cluster.state(job)["JobState"] in ("COMPLETED", "FAILED"), f"job {job}")
    assert cluster.state(job)["JobState"] == "COMPLETED", log.read_text()[-3000:]
    return log.read_text()


def losses(root: Path) -> dict[int, float]:
    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


@pytest.fixture(scope="session")
def readmes_job(cluster: SlurmCluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README's job on a cluster as printed, but with the tiny model and on two nodes of one process."""
    folder = tmp_path_factory.mktemp("readme")
    root, out = folder / "run", folder / "out"
    places = {
        "configs/32n_128rows.yaml": config(inputs, root),
        "/nfs/DeepSeek-V3": f"{inputs}/model",
        "/nfs/chats.jsonl": f"{inputs}/train.jsonl",
        "/nfs/out": str(out),
    }
    *commands, serve = printed("README.md", "scripts/slurm/fit.sbatch", places, folder / "stubs")
    assert [words[3] for words in commands if "src.cli" in words] == ["check-data", "plan", "rehearse", "verify"]
    assert serve == ["sbatch", "scripts/vllm/slurm.sh", str(out)]  # tests/test_vllm_scripts.py
    for program, *words in commands:
        if program == "sbatch":
            log = root / "log"
            job = cluster.submit(f"--output={log}", *SIZE, *words)
            assert "0: preflight: 2 nodes ready" in end(cluster, job, log)
            assert cluster.state(job)["Restarts"] == "0"
        else:
            run(*words[2:], DS_ACCELERATOR="cpu")
    assert (out / "model.safetensors").is_file()
    return root


def test_a_preempted_run_saves_requeues_itself_and_ends_as_if_it_had_not_been(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path, readmes_job: Path
) -> None:
    """The overview's dry run on two nodes as printed, preempted at its third step, beside README's job."""
    root, reached = tmp_path / "preempted", tmp_path / "reached"
    pause = {"class_path": "tests.launch.pause.Pause", "init_args": {"step": 3, "reached": str(reached)}}
    places = {
        "configs/2gpu_sp2.yaml": config(inputs, root, **{"trainer.callbacks": [pause]}),
        "--trainer.devices 8": "--trainer.devices 1",
        "/nfs/chats.jsonl": f"{inputs}/train.jsonl",
        "--trainer.max_steps 20": "--trainer.max_steps 5",
    }
    _, (_, *words) = printed("docs/overview.md", "--time=0:30:00", places, tmp_path / "stubs")
    log = root / "log"
    job = cluster.submit(f"--output={log}", *SIZE[1:], *words, PREFLIGHT="0")
    cluster.wait_until(reached.exists, f"step 3 of {log}")
    cluster.run("scancel", "--signal=USR1", job)
    said = end(cluster, job, log)
    assert cluster.state(job)["Restarts"] == "1"
    assert 'to be continued: {"step": 3, "why": "SIGUSR1"}' in said and f"job {job}, start 1, on n[1-2]" in said
    page = pasted("docs/overview.md", "step 3/6").replace("SIGTERM", "SIGUSR1")
    steps = "step 0/0 loss 0 0 tokens/s left 0"  # tests/callbacks/test_progress.py
    assert [line for line in shape(page) if line not in (steps, *shape(said))] == []
    uninterrupted, resumed = losses(readmes_job), losses(root)
    assert list(uninterrupted) == [1, 2, 3, 4, 5] and resumed == uninterrupted
    checkpoints = root / "checkpoints"
    assert os.readlink(checkpoints / "last.ckpt") == "step=5.ckpt" and (checkpoints / "step=3.ckpt").is_dir()
    assert not list(ROOT.glob(".stopped-*"))


def test_what_launching_says_of_a_bad_node_is_understood(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The scheduler's own commands of docs/launching.md, with a job that waits and the node n2."""
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nsleep 60\n")
    job = cluster.submit("--hold", f"--output={tmp_path}/log", str(sleeper))
    text = (ROOT / "docs/launching.md").read_text(encoding="utf-8")
    commands = re.findall(r"`(scontrol update [^`]*)`", " ".join(text.split()))
    assert len(commands) == 2
    for command in commands:
        cluster.run(*shlex.split(command.replace("JOB", job).replace("n17", "n2")))
    assert cluster.state(job)["ExcNodeList"] == "n2"
    assert cluster.run("sinfo", "-h", "-n", "n2", "-o", "%E").strip() == "ECC, GPU 3"
    assert "`State=RESUME`" in text
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    cluster.run("scancel", job)
    cluster.wait_until(
        lambda: cluster.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", "two idle nodes", 30
    )


def test_a_node_with_other_weights_is_named_and_nothing_is_started(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path
) -> None:
    """Each node has a local disk of its own for the weights: the working directory, here."""
    for node in ("n1", "n2"):
        shutil.copytree(inputs / "model", tmp_path / node / "model")
    other = tmp_path / "n2/model/config.json"
    other.write_text(other.read_text() + " ")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nexport PYTHONPATH={ROOT}\ncd {tmp_path}/$SLURMD_NODENAME\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    log = tmp_path / "log"
    values = [config(inputs, tmp_path / "run"), "--model.pretrained=model"]
    job = cluster.submit(f"--output={log}", *SIZE, "scripts/slurm/fit.sbatch", *values, PYTHON=str(python))
    cluster.wait_until(lambda: cluster.state(job)["JobState"] in ("COMPLETED", "FAILED"), f"job {job}")
    said = log.read_text()
    assert cluster.state(job)["JobState"] == "FAILED"
    assert "n2: weights: config.json is " in said and "0: n1: " not in said
    printed = shape(said)  # srun's own lines are now and then more
    assert [line for line in shape(pasted("docs/launching.md", "== 2026")) if line not in printed] == []
    assert not (tmp_path / "run/checkpoints").exists()
