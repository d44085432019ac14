import json
import os
import stat
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import Timeout
from transformers import PreTrainedTokenizerFast

from src.datamodules.cache import open_or_build, open_or_check
from src.datamodules.cache_build import CacheBuild
from src.datamodules.tokenization import TokenizeOptions
from src.errors import UserError
from tests.disk.full import full_disk

from .conftest import question_answer

Write = Callable[..., str]
OPTIONS = TokenizeOptions(max_length=64)


@pytest.fixture
def build(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path) -> CacheBuild:
    path = write_jsonl("a.jsonl", question_answer("q", "a"))
    return CacheBuild([path], tokenizer, OPTIONS, tmp_path / "cache", None)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0)
    yield os.umask
    os.umask(before)


def test_what_killed_builds_left_is_removed_under_their_locks(build: CacheBuild) -> None:
    """At once where they were of this machine, whatever the data was; not while somebody builds, and late where
    another machine may."""
    where = build.directory.parent
    where.mkdir()
    host = os.uname().nodename

    def left(name: str, host: str = host, age: float = 0.0) -> Path:
        folder = where / f"{name}.building-{host}-{len(list(where.iterdir()))}"
        (folder / "datasets").mkdir(parents=True)
        os.utime(folder, (time.time() - age,) * 2)
        return folder

    own, other, busy = left(build.directory.name), left("edited-since"), left("being-built")
    elsewhere, old = left(build.directory.name, "n2"), left("any", "n2", age=90_000)
    with build.lock(where / "being-built"), build.lock(), build.aside() as building:
        assert [folder.exists() for folder in (own, other, busy, elsewhere, old, building)] == [
            *(False, False, True, True, False),
            True,
        ]
    assert not building.exists()
    with build.lock(), build.aside():
        assert not busy.exists() and elsewhere.exists()


def test_a_lock_is_held_by_one(build: CacheBuild, tmp_path: Path) -> None:
    with build.lock(), pytest.raises(Timeout), build.lock(timeout=0):
        pass
    with build.lock(timeout=0):
        pass


@pytest.mark.parametrize(
    ("mask", "folder", "file"), [(0o002, 0o775, 0o664), (0o022, 0o755, 0o644), (0o077, 0o700, 0o600)]
)
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_cache_has_the_permissions_that_the_umask_gives(
    mask: int,
    folder: int,
    file: int,
    num_proc: int,
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Write,
    tmp_path: Path,
    umask: Callable[[int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that whoever is of the group of a shared folder can read what another has tokenised."""
    monkeypatch.setattr("src.datamodules.reader.ROWS_PER_SPAN", 1)
    umask(mask)
    path = write_jsonl("a.jsonl", *(question_answer("q", answer) for answer in "ab"), [])
    with open_or_check([path], tokenizer, TokenizeOptions(64, bad_rows="skip"), tmp_path / "cache", num_proc) as cache:
        found = {item.name.split("-")[0]: stat.S_IMODE(item.stat().st_mode) for item in cache.directory.iterdir()}
        assert found == dict.fromkeys(("data", "manifest.json", "skipped.jsonl"), file)
        assert [stat.S_IMODE(item.stat().st_mode) for item in (cache.directory, cache.directory.parent)] == [folder] * 2


@pytest.mark.parametrize("mode", [0o2775, 0o700])
def test_whoever_may_write_to_the_folder_may_take_its_locks(
    mode: int, build: CacheBuild, umask: Callable[[int], int]
) -> None:
    umask(0o077)
    build.directory.parent.mkdir()
    build.directory.parent.chmod(mode)
    with build.lock():
        assert stat.S_IMODE(Path(f"{build.directory}.lock").stat().st_mode) == mode & 0o666


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
def test_another_user_of_the_group_opens_checks_and_builds(
    tokenizer: PreTrainedTokenizerFast, umask: Callable[[int], int]
) -> None:
    umask(0o022)
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is for its owner alone
        Path(folder).chmod(0o755)
        shared, paths = Path(folder) / "shared", [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]
        for path in paths:
            Path(path).write_text(json.dumps({"messages": question_answer("q", path)}))
        shared.mkdir()
        os.chown(shared, 0, 4321)
        shared.chmod(0o2775)
        ours = open_or_build(paths[:1], tokenizer, OPTIONS, shared)
        with CacheBuild(paths[1:], tokenizer, OPTIONS, shared, None).lock():
            pass  # a build that came to nothing
        pid = os.fork()
        if not pid:
            try:
                os.setgroups([])
                os.setgid(4321)
                os.setuid(4321)
                assert open_or_build(paths[:1], tokenizer, OPTIONS, shared).fingerprint == ours.fingerprint
                with open_or_check(paths[:1], tokenizer, OPTIONS, shared) as cache:
                    assert len(cache) == 1
                assert len(open_or_build(paths[1:], tokenizer, OPTIONS, shared, 1)) == 1
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_cache_dir_that_cannot_be_written_to_is_named(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path
) -> None:
    path = write_jsonl("a.jsonl", question_answer("q", "a"))
    for where in (Path(path), Path(path) / "cache"):
        with pytest.raises(ValueError, match=r"a\.jsonl.* cannot be written to \(.*\); give another --data.cache_dir"):
            open_or_build([path], tokenizer, OPTIONS, where)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_disk_that_fills_up_is_named(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path, num_proc: int
) -> None:
    paths = [write_jsonl(f"{n}.jsonl", *[question_answer("q " * 30, "a " * 30)] * 200) for n in range(2)]
    said = rf"{tmp_path}/cache/\w+ could not be written: File too large, .*another disk .data.cache_dir."
    with full_disk(4096), pytest.raises(UserError, match=said):
        open_or_build(paths, tokenizer, TokenizeOptions(max_length=256), tmp_path / "cache", num_proc)
    assert not [file for file in (tmp_path / "cache").iterdir() if file.is_dir()]
