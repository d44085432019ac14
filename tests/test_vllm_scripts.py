"""scripts/vllm: what a dry run prints, and what stand-ins for srun, pdsh, ray, vllm and curl are called with."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts/vllm"
NODES = ["node0", "node1", "node2", "node3"]
WEIGHTS = "Ann's models/deepseek sft"
MODEL = f"/nfs/{WEIGHTS}"

# Each writes a line to $STATE/log. Nodes are this machine: NODE says which one a command believes to be on.
STAND_INS = {
    "scontrol": 'printf "node%s\\n" 0 1 2 3',
    "srun": """
        for argument; do [[ $argument != --nodelist=* ]] || nodes=${argument#*=}; done
        while [[ $1 == -* ]]; do shift; done
        trap 'kill $(jobs -p) 2>/dev/null; exit' TERM EXIT
        for node in ${nodes//,/ }; do NODE=$node "$@" & done; wait -n""",
    "pdsh": """
        [[ "$1 $2 $3 $4" == "-S -R ssh -w" ]] || exit 9
        for node in ${5//,/ }; do NODE=$node sh -c "$6" & done; wait""",
    "ip": 'echo "2: bond0    inet 10.0.0.${NODE#node}/24 brd 10.0.0.255 scope global bond0"',
    "ray": """
        [[ $1 != status ]] || { [[ -f $STATE/head ]]; exit; }
        [[ $* != *--head* ]] || sleep 0.3
        echo "$NODE ray $*" >>"$STATE/log"
        [[ $1 != stop ]] || exec kill $(cat "$STATE/$NODE.pid")
        [[ $* != *--head* ]] || touch "$STATE/head"
        echo $$ >"$STATE/$NODE.pid"
        exec sleep 60""",
    "vllm": """
        echo "$NODE vllm" >>"$STATE/log"; printf '%s\\n' "$@" >"$STATE/arguments"
        [[ -z ${BROKEN:-} ]] || exit 1
        sleep 0.3; touch "$STATE/ready"
        until [[ -f $STATE/asked ]]; do sleep 0.05; done""",
    "curl": """
        case "$*" in
            */health) [[ -f $STATE/ready ]] || exit 22; echo "healthy" >>"$STATE/log";;
            *) echo "asked" >>"$STATE/log"; echo "${@: -1}" >"$STATE/request"; touch "$STATE/asked"; echo '{"391"}';;
        esac""",
}


def start(name: str, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(
        ["bash", str(SCRIPTS / f"{name}.sh"), *args],
        env=environment | {"NODES": ",".join(NODES)} | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-ins' log, and the stand-ins on PATH."""
    programs, model = tmp_path / "bin", tmp_path / WEIGHTS
    programs.mkdir()
    model.mkdir(parents=True)
    (model / "config.json").touch()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(tmp_path))
    monkeypatch.setenv("POLL_SECONDS", "0.1")
    return tmp_path


def remote(command: str) -> tuple[str, list[str]]:
    """Of a line of a dry run: the nodes, and the words that the last command on them is given."""
    words = shlex.split(command)
    if words[0] == "srun":
        nodes = next(word.removeprefix("--nodelist=") for word in words if word.startswith("--nodelist="))
        line = words[-1]
    else:
        nodes, line = words[words.index("-w") + 1], shlex.split(words[-1])[-1]
    return nodes, shlex.split(line.rpartition("exec ")[2])


@pytest.mark.parametrize("name", ["slurm", "pdsh"])
def test_a_dry_run_prints_every_command_in_order(name: str) -> None:
    result = start(name, "--dry-run", MODEL)
    assert result.returncode == 0, result.stderr
    head, workers, serve, health, ask = result.stdout.splitlines()
    assert remote(head)[0] == "node0" and remote(workers)[0] == "node1,node2,node3" and remote(serve)[0] == "node0"
    assert remote(head)[1][:3] == ["ray", "start", "--block"] and "--head" in remote(head)[1]
    assert "--address=node0:6379" in remote(workers)[1] and "until ray status" in workers
    _, words = remote(serve)
    assert words[:3] == ["vllm", "serve", MODEL]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    nodes = 1 + len(remote(workers)[0].split(","))
    assert int(options["--tensor-parallel-size"]) * int(options["--pipeline-parallel-size"]) == nodes * 8
    assert options["--served-model-name"] == "deepseek-sft" and options["--max-model-len"] == "32768"
    assert health.endswith("http://node0:8000/health")
    assert json.loads(shlex.split(ask)[-1])["model"] == "deepseek-sft"


def test_both_deployments_run_the_same() -> None:
    slurm, pdsh = (start(name, "--dry-run", MODEL).stdout.splitlines() for name in ("slurm", "pdsh"))
    assert [remote(line) for line in slurm[:3]] == [remote(line) for line in pdsh[:3]]
    assert slurm[3:] == pdsh[3:]


@pytest.mark.parametrize("name", ["slurm", "pdsh"])
def test_the_right_programs_are_called_in_the_right_order(name: str, state: Path) -> None:
    settings = {"NETWORK_INTERFACE": "bond0", "QUESTION": 'Say "hi" \\'}
    if name == "slurm":
        settings["SLURM_JOB_NODELIST"] = "node[0-3]"
    model = str(state / WEIGHTS)
    result = start(name, model, **settings)
    assert result.returncode == 0, result.stderr
    assert '{"391"}' in result.stdout
    log = (state / "log").read_text().splitlines()
    ray = [line for line in log if " ray start" in line]
    assert ray[0] == (
        "node0 ray start --block --node-ip-address=10.0.0.0 --num-gpus=8 --head --port=6379 --dashboard-port=8265 "
        f"--temp-dir=/tmp/ray_{subprocess.check_output(['id', '-un'], text=True).strip()}"
    )
    assert sorted(ray[1:]) == [
        f"node{n} ray start --block --node-ip-address=10.0.0.{n} --num-gpus=8 --address=node0:6379" for n in (1, 2, 3)
    ]
    assert log.index("node0 vllm") > log.index(ray[0]) and log.index("healthy") > log.index("node0 vllm")
    assert log.index("asked") == log.index("healthy") + 1
    assert (state / "arguments").read_text().splitlines()[:2] == ["serve", model]
    assert json.loads((state / "request").read_text()) == {
        "model": "deepseek-sft",
        "messages": [{"role": "user", "content": 'Say "hi" \\'}],
    }
    if name == "pdsh":
        assert sum(line.endswith("ray stop") for line in log) == 4


@pytest.mark.parametrize("name", ["slurm", "pdsh"])
def test_a_server_that_ends_is_an_error(name: str, state: Path) -> None:
    result = start(name, str(state / WEIGHTS), BROKEN="1", SLURM_JOB_NODELIST="node[0-3]")
    assert result.returncode != 0 and "error: no answer from http://node0:8000 after" in result.stderr
    assert "No such process" not in result.stderr


@pytest.mark.parametrize("name", ["slurm", "pdsh"])
def test_weights_that_are_not_there_are_named(name: str, state: Path) -> None:
    result = start(name, MODEL, SLURM_JOB_NODELIST="node[0-3]")
    assert result.returncode != 0 and f"{MODEL} has no config.json; give an exported" in result.stderr
    started = (state / "log").read_text() if (state / "log").exists() else ""
    assert " start" not in started and "vllm" not in started and "No such process" not in result.stderr


@pytest.mark.parametrize("name", ["slurm", "pdsh"])
def test_sizes_that_do_not_multiply_are_refused(name: str, state: Path) -> None:
    result = start(name, MODEL, PIPELINE_PARALLEL="3", SLURM_JOB_NODELIST="node[0-3]")
    assert result.returncode == 2
    assert "TENSOR_PARALLEL 8 x PIPELINE_PARALLEL 3 is 24 GPUs, but 4 nodes x GPUS_PER_NODE 8 are 32" in result.stderr


def test_what_is_missing_is_said() -> None:
    assert "usage: slurm.sh [--dry-run] MODEL" in start("slurm").stderr
    assert "submit it with sbatch, or look at it with --dry-run" in start("slurm", MODEL).stderr
    assert "NODES=node0,node1,node2,node3" in start("pdsh", MODEL, NODES="").stderr


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda script: script.name)
def test_bash_reads_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", script.relative_to(ROOT)], cwd=ROOT, check=True)
