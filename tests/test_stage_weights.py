"""scripts/stage_weights.sh: a copy that is whole or not there, whatever happens."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/stage_weights.sh"


def stage(*args: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if path is None else {"PATH": f"{path}:{os.environ['PATH']}"})
    command = ["bash", str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    source = tmp_path / "shared/model"
    (source / "sub folder").mkdir(parents=True)
    (source / "blob").write_bytes(os.urandom(100_000))
    (source / "model-00001-of-00002.safetensors").symlink_to("blob")  # as the hub's cache has them
    for name in ("config.json", "model-00002-of-00002.safetensors", "sub folder/chat template.jinja"):
        (source / name).write_text(name)
    return source


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_whole_copy_and_nothing_twice(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "local/disk/model"
    result = stage(model, target)
    assert result.returncode == 0 and f"bytes in {target}" in result.stdout, result.stderr
    assert contents(target) == contents(model) and not any(file.is_symlink() for file in target.rglob("*"))
    assert [file.name for file in target.parent.iterdir()] == ["model"]
    assert "is there already" in stage(model, target).stdout
    (model / "more.safetensors").touch()
    result = stage(model, target)
    assert result.returncode == 1 and "holds other files than" in result.stderr


def test_what_is_interrupted_or_damaged_does_not_get_the_name(model: Path, tmp_path: Path) -> None:
    target, bin_folder = tmp_path / "local/model", tmp_path / "bin"
    (tmp_path / "local/model.partial").mkdir(parents=True)
    (tmp_path / "local/model.partial/old.safetensors").touch()
    bin_folder.mkdir()
    tee = bin_folder / "tee"  # a disk that loses the last byte
    tee.write_text(f'#!/bin/bash\n{shutil.which("tee")} "$1"\ntruncate -s -1 "$1"\n')
    tee.chmod(0o755)
    result = stage(model, target, path=bin_folder)
    assert result.returncode == 1 and "is not what was written" in result.stderr and not target.exists()
    assert stage(model, target).returncode == 0 and contents(target) == contents(model)


def test_what_cannot_be_staged_is_refused(model: Path, tmp_path: Path) -> None:
    result = stage(tmp_path, tmp_path / "x")
    assert result.returncode == 1 and "has no config.json: give the model's directory" in result.stderr
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "df").write_text("#!/bin/bash\nprintf 'Avail\\n 1000\\n'\n")
    (bin_folder / "df").chmod(0o755)
    result = stage(model, tmp_path / "x", path=bin_folder)
    assert result.returncode == 1 and "and 1000 are free there: make room" in result.stderr
    assert not (tmp_path / "x").exists() and stage().returncode == 2
