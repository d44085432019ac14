"""What preflight says of nodes that differ, are slow, are broken or do not come."""

import os
import re
import resource
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jsonargparse import Namespace

from src.commands import preflight
from src.commands.config_command import ConfigCommand
from src.planner.cluster import read_cluster, write_cluster
from src.preflight import files, measure, node
from src.preflight.ranks import Absent, Ranks, meet
from src.preflight.verdict import Report, cluster, lines, problems
from tests.distributed.spawn import free_port, run_distributed


def report(rank: int, **values: Any) -> Report:
    return Report(rank, rank % 2, f"n{rank // 2}", **values)


def test_the_nodes_that_differ_from_most_are_named() -> None:
    reports = [report(rank, same={"code": {"revision": "new"}}) for rank in range(6)]
    reports[2].same["code"] = reports[3].same["code"] = {"revision": "old"}
    assert problems(reports, cuda=False) == {
        "n1": ["code: revision is old, elsewhere new; check out the same revision there, or start from a shared folder"]
    }


def test_many_differences_are_counted_and_a_missing_file_is_one() -> None:
    whole = {f"model-{index}.safetensors": "9 bytes, abcd" for index in range(6)}
    reports = [report(0, same={"weights": whole}), report(2, same={"weights": whole}), report(4, same={"weights": {}})]
    found = problems(reports, cuda=False)
    assert list(found) == ["n2"] and len(found["n2"]) == 4
    assert found["n2"][0].startswith("weights: model-0.safetensors is absent, elsewhere 9 bytes, abcd; copy the file")
    assert found["n2"][3] == "weights: 3 more differences"


def test_slow_wrong_and_late_gpus_are_named() -> None:
    reports = [
        report(rank, rates={"matmul_tflops": 700.0}, same={"arithmetic": {"product": "aa"}}) for rank in range(6)
    ]
    reports[3].rates["matmul_tflops"] = 500.0
    reports[5].same["arithmetic"] = {"product": "ab"}
    reports[0].network = {"wrong": [4]}
    for late in reports[:2]:
        late.time = 60.0
    found = problems(reports, cuda=True)
    assert found["n1"] == ["GPU 1: matmul_tflops 500, the median is 700; drain the node"]
    assert [line.split(";")[0] for line in found["n2"]] == [
        "arithmetic: product is ab, elsewhere aa",
        "rank 4's data arrived changed at rank 0",
    ]
    assert found["n0"] == ["its clock is +60 s off; start NTP (chronyd) there"]
    assert "n1" not in problems(reports, cuda=False)


def test_a_node_is_slow_where_it_is_so_with_both_neighbours() -> None:
    with_next = [300.0, 100.0, 110.0, 290.0]  # GB/s of nodes 0 and 1, 1 and 2, 2 and 3, 3 and 0
    reports = [
        Report(n, 0, f"n{n}", network={"pairs": {(n + 1) % 4: with_next[n], (n - 1) % 4: with_next[n - 1]}})
        for n in range(4)
    ]
    assert list(problems(reports, cuda=True)) == ["n2"]


def test_a_node_whose_optimizer_is_slow_is_named() -> None:
    reports = [report(rank, adam=0.2 if rank in (2, 3) else 1.5) for rank in range(6)]
    found = problems(reports, cuda=True)
    assert list(found) == ["n1"] and found["n1"][0].startswith(
        "the optimizer on the host (DeepSpeedCPUAdam) 0.4e9 parameters/s, the median is 3e9; look at OMP_NUM_THREADS"
    )


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_each_node_meets_both_neighbours_and_one_at_a_time(count: int) -> None:
    rounds = measure.ring(count)
    for pairs in rounds:
        busy = [member for pair in pairs for member in pair]
        assert len(busy) == len(set(busy))
    assert sorted(pair for pairs in rounds for pair in pairs) == [(n, (n + 1) % count) for n in range(count)]


def test_the_verdict_tells_how_to_start_without_the_bad_node() -> None:
    assert lines({}, ["n1", "n2"], slurm=True) == ["preflight: 2 nodes ready"]
    told = lines({"n2": ["no GPU", "no disk"]}, ["n1", "n2"], slurm=True)
    assert told[:3] == ["n2: no GPU", "n2: no disk", "preflight: 1 of 2 nodes failed: n2"]
    assert "sbatch --exclude=n2" in told[3]
    assert len(lines({"n2": ["no GPU"]}, ["n1", "n2"], slurm=False)) == 2


def test_the_cluster_is_as_its_weakest_node(tmp_path: Path) -> None:
    reports = [
        report(
            rank,
            rates={"matmul_tflops": 700.0 - rank, "pcie_in_gb_s": 50.0, "pcie_out_gb_s": 51.0},
            values={"gpu": "H100", "host_memory_gib": 2000.0 - rank, "nics_per_node": 8} if rank % 2 == 0 else {},
            network={"world": 300.0 + rank, "intra": 350.0, "exchange_intra": 340.0, "exchange_inter": 40.0 + rank},
            disk=(10**9, 1.0 + rank // 2, 0.5),
            adam=2.0 + rank,
        )
        for rank in range(4)
    ]
    write_cluster(tmp_path / "cluster.yaml", cluster(reports, cuda=True))
    read = read_cluster(tmp_path / "cluster.yaml")
    assert (read.matmul_tflops, read.host_memory_gib, read.nics_per_node) == (697.0, 1998.0, 8)
    assert (read.nccl_inter_node_gb_s, read.disk_write_gb_s, read.disk_read_gb_s) == (300.0, 1.0, 4.0)
    assert (read.exchange_inter_node_gb_s, read.exchange_intra_node_gb_s) == (40.0, 340.0)
    assert read.cpu_adam_gparams_s == 5.0  # a node's ranks together
    reports[2].adam = None
    assert cluster(reports, cuda=True)["cpu_adam_gparams_s"] == 5.0
    assert "nccl_inter_node_gb_s" not in read.assumed and "cpu_cores" in read.assumed
    assert set(cluster(reports, cuda=False)) == {
        "gpu", "host_memory_gib", "nics_per_node", "disk_write_gb_s", "disk_read_gb_s",
    }  # fmt: skip


GOOD = ["0", "NVIDIA H100 80GB HBM3", "580.95", "81559", "1", "0", "0x0000000000000000", "31"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (4, "30000", "GPU 0: 30000 MiB in use by another process"),
        (5, "3", "GPU 0: 3 uncorrected ECC errors"),
        (6, "0x0000000000000048", "GPU 0: clock held down .hardware slowdown, too hot, 31 C."),
    ],
)
def test_the_state_of_a_gpu(field: int, value: str, said: str) -> None:
    good = [["00:1", "0", "0"]]
    assert node.gpu_problems([GOOD], good, 1) == []
    bad = [*GOOD[:field], value, *GOOD[field + 1 :]]
    (problem,) = node.gpu_problems([bad], good, 1)
    assert re.match(said, problem)
    assert node.gpu_problems([GOOD], [["00:1", "0", "1"]], 1)[0].endswith("have the GPU replaced")
    assert "fallen off the bus" in node.gpu_problems([GOOD], good, 8)[0]


def test_nics_are_counted_where_they_are_up(tmp_path: Path) -> None:
    ports = (("mlx5_0", "ACTIVE", 400), ("mlx5_1", "ACTIVE", 400), ("mlx5_2", "ACTIVE", 25), ("mlx5_3", "DOWN", 10))
    for name, state, rate in ports:
        port = tmp_path / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
        (port / "rate").write_text(f"{rate} Gb/sec (4X NDR)")
    assert node.nics(tmp_path) == ([], {"nics_per_node": 2, "nic_gbit": 400})
    for name in ("mlx5_0", "mlx5_1", "mlx5_2"):
        (tmp_path / name / "ports/1/state").write_text("1: DOWN")
    assert "no InfiniBand port is active (mlx5_0/1" in node.nics(tmp_path)[0][0]
    assert node.nics(tmp_path / "none") == ([], {})


def test_too_little_memory_is_said() -> None:
    found, values = node.memory(1e6, cuda=False)
    assert "the plan needs 1000000" in found[0] and values["host_memory_gib"] > 0
    assert node.memory(0.1, cuda=False)[0] == []
    limited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY
    assert any("ulimit -l unlimited" in text for text in node.memory(None, cuda=True, infiniband=True)[0]) == limited


def test_the_limit_of_a_control_group_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "slurm/job_7/step_0").mkdir(parents=True)
    (root / "memory/docker").mkdir(parents=True)
    process.write_text("0::/slurm/job_7/step_0\n")
    assert node.memory_limit(process, root) is None and node.memory_limit(tmp_path / "none", root) is None
    (root / "slurm/job_7/step_0/memory.max").write_text("max\n")
    (root / "slurm/job_7/memory.max").write_text(f"{3 << 30}\n")
    assert node.memory_limit(process, root) == 3 << 30
    process.write_text("9:name=systemd:/\n4:cpu,memory:/docker/f00\n0::/\n")
    (root / "memory/docker/memory.limit_in_bytes").write_text(f"{2 << 30}\n")
    assert node.memory_limit(process, root) == 2 << 30
    monkeypatch.setattr(node, "memory_limit", lambda: 1 << 20)
    problems, values = node.memory(0.01, cuda=False)
    assert "its cgroup's limit), the plan needs 0; ask for" in problems[0] and values["host_memory_gib"] == 0.0


def test_files_are_compared_by_size_and_header(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no config.json and weights"):
        files.weights(str(tmp_path), config_only=False)
    header = b"{}      "
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    before = files.weights(str(tmp_path), config_only=False)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + b"{ }     " + b"1234")
    after = files.weights(str(tmp_path), config_only=False)
    assert before["config.json"] == after["config.json"] and before["model.safetensors"] != after["model.safetensors"]
    assert set(files.weights(str(tmp_path), config_only=True)) == {"config.json"}
    os.mkfifo(tmp_path / "more.json")  # which is not opened
    assert files.weights(str(tmp_path), config_only=False) == after


class Parse(ConfigCommand):
    name = "parse"

    def run_command(self) -> None:
        pass


def test_validation_sets_are_looked_at_and_a_run_that_goes_on_needs_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--config", "configs/tiny_cpu.yaml", "--trainer.default_root_dir", str(tmp_path)]
    more = ["--model.from_scratch", "false", "--data.val_sets", "{math: [none.jsonl]}", "--ckpt_path", "auto"]
    config = Parse([*arguments, *more]).config

    def planned(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(preflight, "settings_of", planned)
    first, then = report(0), report(0)
    preflight._look(first, config, cuda=False)
    (tmp_path / "checkpoints/step=1.ckpt").mkdir(parents=True)
    preflight._look(then, config, cuda=False)
    assert any(problem.startswith("weights: ") for problem in first.problems)
    assert not any(problem.startswith("weights: ") for problem in then.problems)
    assert any(problem.startswith("data: ") and "none.jsonl" in problem for problem in then.problems)


def test_shared_experts_are_looked_at(tmp_path: Path) -> None:
    arguments = ["--config", "configs/tiny_cpu.yaml", "--trainer.default_root_dir", str(tmp_path)]
    arguments += ["--trainer.num_nodes=4", "--trainer.strategy.sequence_parallel_size=1"]

    def look(size: int) -> tuple[list[str], str]:
        found, config = report(0), Parse([*arguments, f"--trainer.strategy.expert_parallel_size={size}"]).config
        preflight._look(found, config, cuda=False)
        said = preflight._experts_across_nodes(config.trainer)
        return [problem for problem in found.problems if problem.startswith("experts")], said

    assert look(1) == look(2) == ([], "")
    assert look(4)[0] == [] and "size 4 leaves the nodes of 2 ranks: nodes 0 to 1 are the first group" in look(4)[1]
    (problem,), said = look(3)
    assert "It may be 1, 2, 4, 8." in problem and not said


def test_the_disks_room_is_for_checkpoints_weights_and_export() -> None:
    more = ["--weights.every_n_train_steps", "5", "--export.out", "x"]
    _, alone = preflight._needs(Parse(["--config", "configs/32n_sp4.yaml"]).config)
    _, disk = preflight._needs(Parse(["--config", "configs/32n_sp4.yaml", *more]).config)
    assert alone and disk and disk - alone == pytest.approx(4 * 2 * 682.6e9, rel=1e-3)


def _measure() -> tuple[dict[str, Any], list[int], int, float]:
    ranks = Ranks.from_environment(os.environ | {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "1"})
    meet(ranks, "gloo")
    network = measure.network(ranks, torch.device("cpu"))
    gather = dist.all_gather_into_tensor

    def corrupted(received: Any, sent: Any, group: Any = None, async_op: bool = False) -> Any:
        gather(received, sent, group=group)
        received[len(sent) + 5] ^= 1  # a bit of rank 1's part

    dist.all_gather_into_tensor = corrupted  # type: ignore[assignment]
    _, wrong = measure.all_gather(None, torch.device("cpu"))
    rate = measure.host_optimizer(torch.device("cpu"))()
    dist.destroy_process_group()
    return network, wrong, ranks.nodes, rate


def test_all_gathers_over_pairs_and_over_all_nodes() -> None:
    for rank, (network, wrong, nodes, rate) in enumerate(run_distributed(_measure, 3)):
        assert nodes == 3 and network["wrong"] == [] and wrong == [1]
        assert set(network["pairs"]) == {0, 1, 2} - {rank} and network["world"] > 0 and rate > 0
        assert "exchange_intra" not in network and network["exchange_inter"] > 0  # nodes of one rank


def _exchange(bit: int) -> dict[str, Any]:
    ranks = Ranks.from_environment(os.environ | {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2"})
    meet(ranks, "gloo")
    exchange = dist.all_to_all_single

    def corrupted(received: torch.Tensor, sent: torch.Tensor, group: Any = None) -> None:
        exchange(received, sent, group=group)
        received[1, 5] ^= bit  # of the second rank's part

    dist.all_to_all_single = corrupted  # type: ignore[assignment]
    network = measure.network(ranks, torch.device("cpu"))
    dist.destroy_process_group()
    return network


def test_all_to_alls_in_a_node_and_between_ranks_of_the_same_number() -> None:
    for network in run_distributed(_exchange, 4, 0):
        assert network["wrong"] == [] and network["exchange_intra"] > 0 and network["exchange_inter"] > 0
    assert [network["wrong"] for network in run_distributed(_exchange, 4, 1)] == [[1, 2], [1, 3], [3, 2], [3, 3]]


def _differ(rank_without: int) -> tuple[float | None, list[str]]:
    """One rank cannot read its config's model; the others would measure."""
    ranks = Ranks.from_environment(os.environ | {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "1"})
    meet(ranks, "gloo")
    planned = None if ranks.rank == rank_without else SimpleNamespace(offload_optimizer=True)
    preflight._planned = lambda _: planned  # type: ignore[assignment,return-value]
    found = report(ranks.rank)
    preflight._measure_host_optimizer(found, Namespace(), torch.device("cpu"))
    dist.barrier()
    dist.destroy_process_group()
    return found.adam, found.problems


def test_ranks_that_see_different_configs_do_not_wait_for_one_another() -> None:
    assert run_distributed(_differ, 2, 1) == [(None, []), (None, [])]
    assert all(rate and rate > 0 and not problems for rate, problems in run_distributed(_differ, 2, -1))


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    alone = Ranks(0, 4, 0, 2, "n0", "127.0.0.1", free_port())
    with pytest.raises(Absent) as error:
        meet(alone, "gloo", patience=0.3)
    first, second = str(error.value).splitlines()
    assert first.startswith("node number 0: ranks 1 did not come") and second.startswith(
        "node number 1: ranks 2, 3 did"
    )


def test_the_launchers(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    scripts = ["scripts/slurm/common.sh", "scripts/slurm/fit.sbatch", "scripts/pdsh/fit.sh"]
    subprocess.run(["shellcheck", "-x", *scripts], cwd=root, check=True)

    def dry(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "scripts/pdsh/fit.sh", "--dry-run", *args]
        return subprocess.run(command, cwd=root, env=os.environ | more, capture_output=True, text=True)

    printed = dry("configs/32n_sp4.yaml", "--model.pretrained=/a b", NODES="x,y", NETWORK_INTERFACE="bond0").stdout
    commands = printed.splitlines()
    assert [line.split()[5] for line in commands] == ["x", "y", "x", "y"]
    for rank, line in enumerate(commands):
        words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout
        assert f"--node_rank={rank % 2} " in words and "--nnodes=2 " in words and "--master_addr=x " in words
        assert "NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0" in words and r"--model.pretrained=/a\ b" in words
        assert f"src.cli {'preflight' if rank < 2 else 'fit'} --config configs/32n_sp4.yaml --ckpt_path auto" in words
    assert "there is no config" in dry("configs/none.yaml", NODES="x").stderr
    assert "usage: " in dry(NODES="x").stderr


def test_srun_alone_meets_at_the_jobs_first_node() -> None:
    names = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "8"}
    slurm = names | {"SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_STEP_NODELIST": "node[07-08]"}
    ranks = Ranks.from_environment(slurm)
    assert (ranks.address, ranks.nodes, ranks.rank) == ("node07", 2, 9)
    assert Ranks.from_environment(slurm | {"MASTER_ADDR": "here"}).address == "here"
    assert Ranks.from_environment(names | {"SLURM_STEP_ID": "0"}).address == "127.0.0.1"
