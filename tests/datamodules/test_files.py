import hashlib
import os
from pathlib import Path

import pytest

from src.datamodules import files
from src.datamodules.files import NoMatch, digest, expand, look_up


def test_files_are_sorted_within_a_pattern(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.jsonl").mkdir()
    found = expand([str(tmp_path / "c.txt"), str(tmp_path / "*.jsonl")])
    assert [Path(path).name for path in found] == ["c.txt", "a.jsonl", "b.jsonl"]
    for pattern in ("nowhere/*.jsonl", str(tmp_path), str(tmp_path / "d*.jsonl")):
        with pytest.raises(NoMatch, match=r"no file matches '.*'.*give an existing"):
            expand([pattern])


@pytest.mark.parametrize("second", ["a.jsonl", "./a.jsonl", "sub/../a.jsonl", "*.jsonl", "soft.json", "hard.json"])
def test_a_file_named_twice_is_refused(second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    Path("sub").mkdir()
    Path("soft.json").symlink_to("a.jsonl")
    Path("hard.json").hardlink_to("a.jsonl")
    with pytest.raises(ValueError, match=r"' (\(matched by .*\) )?is the same file as 'a.jsonl'; name it once"):
        expand(["a.jsonl", second])


def test_a_name_that_exists_is_no_glob(tmp_path: Path) -> None:
    for name in ("part[1].jsonl", "part1.jsonl", "what?.jsonl", "whats.jsonl"):
        (tmp_path / name).touch()
    for name in ("part[1].jsonl", "what?.jsonl"):
        assert expand([str(tmp_path / name)]) == [str(tmp_path / name)]
    assert [Path(path).name for path in expand([str(tmp_path / "part[0-9].jsonl")])] == ["part1.jsonl"]


def test_all_that_is_wrong_is_found_and_the_rest_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").symlink_to("nothing")
    os.mkfifo(tmp_path / "c.jsonl")
    paths, problems = look_up([str(tmp_path / "*.jsonl"), "nowhere.jsonl"])
    assert paths == [str(tmp_path / "a.jsonl")]
    assert [str(problem).replace(f"{tmp_path}/", "").split(" (")[0] for problem in problems] == [
        "'b.jsonl'",
        "'c.jsonl'",
        "no file matches 'nowhere.jsonl'",
    ]
    assert "is a link to nothing" in str(problems[0]) and "is not a regular file" in str(problems[1])


def test_a_digest_is_of_all_bytes_and_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PIECE", 4)
    path = tmp_path / "a"
    contents = [b"", b"abcd", b"abcdefghij", b"efghabcdij", b"abcdefghi", b"abcdefghij\0", b"abcXefghij"]
    found = []
    for content in contents * 2:
        path.write_bytes(content)
        found.append(digest(str(path)))
    assert found[:7] == found[7:] and len(set(found)) == 7
    pieces = b"".join(hashlib.sha256(piece).digest() for piece in (b"abcd", b"efgh", b"ij"))
    assert found[2] == hashlib.sha256((10).to_bytes(8, "little") + pieces).hexdigest()
