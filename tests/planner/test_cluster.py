"""The cluster file: what it says is measured, what it does not say is assumed, and what is wrong is said."""

import errno
from pathlib import Path
from typing import NoReturn

import pytest

from src.errors import UserError
from src.planner.cluster import Cluster, read_cluster, write_cluster


def test_a_written_file_is_read_back_and_its_fields_count_as_measured(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    write_cluster(path, {"pcie_in_gb_s": 25.5, "gpu": "NVIDIA H200", "gpus_per_node": 4})
    cluster = read_cluster(path)
    assert (cluster.pcie_in_gb_s, cluster.gpu, cluster.gpus_per_node) == (25.5, "NVIDIA H200", 4)
    assert cluster.measured == {"pcie_in_gb_s", "gpu", "gpus_per_node"}
    assert cluster.disk_write_gb_s == Cluster().disk_write_gb_s and "disk_write_gb_s" in cluster.assumed


def test_bandwidth_follows_from_the_network_cards_where_it_was_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("nics_per_node: 1\nnic_gbit: 400\n")
    assert read_cluster(path).nccl_inter_node_gb_s == pytest.approx(46.25)
    path.write_text("nics_per_node: 1\nnccl_inter_node_gb_s: 40\n")
    assert read_cluster(path).nccl_inter_node_gb_s == 40


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nics: 8\n", r"unknown nics; a cluster has gpu, gpus_per_node"),
        ("pcie_in_gb_s: -1\n", r"pcie_in_gb_s is -1; it must be positive"),
        ("pcie_in_gb_s: fast\n", r"pcie_in_gb_s is 'fast'; it must be a number"),
        ("gpus_per_node: 7.5\n", r"gpus_per_node is 7.5; it must be an integer"),
        ("gpus_per_node: true\n", r"gpus_per_node is True"),
        ("[1, 2]\n", r"holds no fields"),
        ("a: [\n", r"not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_by_field_and_value(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        read_cluster(path)
    assert str(path) in str(error.value)


def test_an_absent_file_and_unknown_measurements_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; `preflight --write"):
        read_cluster(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="unknown speed"):
        write_cluster(tmp_path / "x.yaml", {"speed": 1})


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster.yaml").write_text("nics_per_node: 1\n")

    def denied(*args: object, **more: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    for call in ("stat", "read_text"):  # a folder's rights, a file's
        with monkeypatch.context() as patch:
            patch.setattr(Path, call, denied)
            with pytest.raises(UserError, match=r"cluster\.yaml cannot be read: Permission denied; give another"):
                read_cluster(tmp_path / "cluster.yaml")
