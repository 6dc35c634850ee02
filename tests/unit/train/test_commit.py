from __future__ import annotations

import json
from pathlib import Path

import google_crc32c
import pytest

from mmssl.train import commit as module
from mmssl.train.commit import (
    NotSavedError,
    Writer,
    commit,
    crc32c,
    problem,
    read_manifest,
    write_text,
)


def write(writer: Writer) -> None:
    writer.file("inner/a.bin", lambda path: path.write_bytes(bytes(range(256)) * 40))
    writer.file("b.txt", lambda path: path.write_text("hello"))


def test_a_committed_folder_is_described_by_its_manifest(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    commit(target, write, {"step": 1})
    manifest = read_manifest(target)
    assert manifest["format_version"] == 2
    assert manifest["step"] == 1
    expected = google_crc32c.value(b"hello")
    assert manifest["files"]["b.txt"] == {"size": 5, "crc32c": f"{expected:08x}"}
    assert sorted(manifest["files"]) == ["b.txt", "inner/a.bin"]
    assert problem(target) == ""
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_crc32c_of_the_standard_check_string(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"123456789")
    assert crc32c(tmp_path / "f") == "e3069283"


def test_a_failure_while_writing_leaves_nothing_that_counts(tmp_path: Path) -> None:
    target = tmp_path / "step-1"

    def gone(path: Path) -> None:
        path.write_text("ha")
        raise OSError("the disk went away")

    def fail(writer: Writer) -> None:
        write(writer)
        writer.file("c.txt", gone)
        writer.file("d.txt", lambda path: pytest.fail("nothing is written behind an error"))

    with pytest.raises(NotSavedError, match=r"step-1: not saved: .*c\.txt: the disk went away"):
        commit(target, fail, {})
    assert list(tmp_path.iterdir()) == []
    commit(target, write, {})
    assert problem(target) == ""


def test_a_file_that_rank_0_does_not_see_as_it_was_written_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {"lost.bin": {"size": 3, "crc32c": "00000000"}}
    gather = lambda value: [value, (entries, "")]  # noqa: E731
    monkeypatch.setattr(module.dist, "gather_objects", gather)
    with pytest.raises(NotSavedError, match=r"lost\.bin: missing"):
        commit(tmp_path / "step-1", write, {})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_commit_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "step-1.tmp").mkdir()
    (tmp_path / "step-1.tmp" / "old").write_text("left")
    commit(tmp_path / "step-1", write, {})
    assert sorted(read_manifest(tmp_path / "step-1")["files"]) == ["b.txt", "inner/a.bin"]
    assert not (tmp_path / "step-1" / "old").exists()


def test_a_complete_folder_is_never_rewritten_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    commit(target, write, {"try": 1})
    with pytest.raises(FileExistsError, match="complete already"):
        commit(target, write, {"try": 2})
    assert read_manifest(target)["try"] == 1
    commit(target, write, {"try": 3}, replace=True)
    assert read_manifest(target)["try"] == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "b.txt").unlink(), r"b\.txt: missing"),
        (lambda f: (f / "b.txt").write_text("hell"), "4 bytes instead of 5"),
        (lambda f: (f / "b.txt").write_text("hellO"), "content differs"),
        (lambda f: (f / "manifest.json").unlink(), "No such file"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: "),
        (lambda f: (f / "manifest.json").write_text('{"files": {"a": 3}}'), "not a manifest"),
        (
            lambda f: (f / "manifest.json").write_text(
                json.dumps({"files": {"../x": {"size": 1, "crc32c": ""}}})
            ),
            "not a manifest",
        ),
        (
            lambda f: (f / "manifest.json").write_text('{"format_version": 9, "files": {}}'),
            "format_version 9 is unknown",
        ),
    ],
)
def test_damage_is_found_and_then_replaced(tmp_path: Path, damage: object, message: str) -> None:
    target = tmp_path / "step-1"
    commit(target, write, {})
    damage(target)  # type: ignore[operator]
    import re

    assert re.search(message, problem(target))
    commit(target, write, {})
    assert problem(target) == ""


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    commit(target, write, {})
    (target / "b.txt").write_text("hellO")
    found = [problem(target, every=2, first=rank) for rank in range(2)]
    assert [bool(text) for text in found] == [True, False]
    (target / "b.txt").write_text("hell")  # both look at sizes
    assert all(problem(target, every=2, first=rank) for rank in range(2))


def test_write_text_replaces_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]
