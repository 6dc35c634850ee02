"""Checkpoints at a second location: complete or absent there, too, and fetched when lost here."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import fsspec
import pytest

sys.path.append(str(Path(__file__).parents[2] / "dist"))

from test_resume_exact import compare
from toy_run import run

from mmssl.train import checkpoint
from mmssl.train.copies import Copies, fetch
from mmssl.train.engine import session
from mmssl.types import UserError

TRAIN = {"steps": 6, "save_every": 2, "log_every": 1}


def away(tmp_path: Path) -> str:
    return f"file://{tmp_path}/away"


def test_a_lost_run_goes_on_from_its_copy(tmp_path: Path) -> None:
    train = {**TRAIN, "copy_to": away(tmp_path)}
    with session(threads=1) as device:
        run(device, str(tmp_path / "whole"), train=train)
        shutil.rmtree(tmp_path / "away")
        run(device, str(tmp_path / "part"), train=train, fail_at=4)
        assert (tmp_path / "away" / "step-00000004" / "manifest.json").is_file()
        log = (tmp_path / "part" / "log.jsonl").read_text()
        shutil.rmtree(tmp_path / "part")
        (tmp_path / "part").mkdir()
        (tmp_path / "part" / "log.jsonl").write_text(log)
        run(device, str(tmp_path / "part"), train=train)
        # the damaged newest copy gives way to the one before
        shutil.rmtree(tmp_path / "part")
        weights = tmp_path / "away" / "step-00000006" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        (tmp_path / "away" / "step-00000008").mkdir()  # an interrupted copy has no manifest
        (tmp_path / "part").mkdir()
        (tmp_path / "part" / "log.jsonl").write_text(log)
        run(device, str(tmp_path / "part"), train=train)
    compare(tmp_path / "whole", tmp_path / "part")


def test_copies_of_another_run_are_not_taken(tmp_path: Path) -> None:
    train = {**TRAIN, "copy_to": away(tmp_path)}
    with session(threads=1) as device:
        run(device, str(tmp_path / "a"), train=train)
        with pytest.raises(UserError, match=r"step-00000006 is of a run with another conf"):
            run(device, str(tmp_path / "b"), train={**train, "seed": 1})


def test_a_location_that_fails_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "put_file", refuse)
    with session(threads=1) as device:
        run(device, str(tmp_path / "a"), train={**TRAIN, "copy_to": away(tmp_path)})
    said = capsys.readouterr().out
    assert re.search(r"step-00000006 was not copied: .*access is denied: read-only", said)
    assert checkpoint.newest(tmp_path / "a") is not None
    assert fetch(away(tmp_path), tmp_path / "b", "") is None


def test_unknown_addresses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.copy_to=nowhere://x: cannot be opened"):
        Copies("nowhere://x", print)
