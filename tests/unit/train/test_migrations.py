"""Checkpoints of every earlier version still load; each was written by that version's own code."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "dist"))

from test_resume_exact import losses
from toy_run import run

from mmssl.train import checkpoint
from mmssl.train.commit import problem, read_manifest
from mmssl.train.engine import session
from mmssl.train.migrations import FORMAT_VERSION, MIGRATIONS, migrated

ASSETS = Path(__file__).parents[2] / "assets"


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION))
def test_a_run_of_an_earlier_version_goes_on(version: int, tmp_path: Path) -> None:
    """The toy at ZeRO 1 without dropout, stopped at step 3 of 6."""
    part, whole = tmp_path / "part", tmp_path / "whole"
    shutil.copytree(ASSETS / f"checkpoint_v{version}", part)
    found = checkpoint.newest(part)
    assert found is not None
    assert json.loads((found / "manifest.json").read_text())["format_version"] == version
    assert checkpoint.load_weights(part, ema=True).keys() >= {"scale", "queue"}
    with session(threads=1) as device:
        for folder in (part, whole):
            progress = run(device, str(folder), dropout=0.0, train={"zero": 1, "save_every": 3})
            assert progress is not None
            assert progress.step == 6
    assert losses(part) == pytest.approx(losses(whole), rel=1e-6)
    newest = checkpoint.newest(part)
    assert newest is not None
    assert read_manifest(newest)["format_version"] == FORMAT_VERSION


def test_every_version_has_a_way_on() -> None:
    assert sorted(MIGRATIONS) == list(range(1, FORMAT_VERSION))
    assert migrated({"format_version": 1, "progress": {"step": 7}}) == {
        "format_version": 2,
        "progress": {"step": 7, "evaluated": 7},
        "workers": None,
        "rows": None,
    }


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "2", None, True])
def test_unknown_versions_are_refused(version: object, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": version, "files": {}}))
    said = problem(tmp_path)
    assert f"format_version {version!r} is unknown" in said
    assert ("newer mmssl" in said) == (version == FORMAT_VERSION + 1)
