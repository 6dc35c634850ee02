"""Every method: four steps are two, a new model and a resume, and two more; equal bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_methods import shrinking
from test_resume_exact import compare
from toy_run import ToyLoader

from mmssl import config
from mmssl.build import build_model
from mmssl.check import BEGINS, SPECIAL, VOCABULARY, fake_batch
from mmssl.specs import RunSpec
from mmssl.train.engine import session
from mmssl.train.run import Parts, fit
from mmssl.yamlfile import read_yaml

RUNS = [name for name in config.names(("runs",)) if name.endswith("_tiny")]
_COVERED = {read_yaml(config.find(name)).tree["method"] for name in RUNS}
# methods without a tiny run are made small themselves, so that none can be forgotten
NAMES = [*RUNS, *(name for name in config.names(("methods",)) if name not in _COVERED)]
STEPS, HALF, ROWS = 4, 2, 4


class FakeLoader(ToyLoader):
    """Batch i of a run is a function of i."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(ROWS)
        self.spec = spec

    def __next__(self) -> Any:
        super().__next__()
        return fake_batch(self.spec, ROWS, self.position)


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    with session(threads=1) as found:
        yield found


def small_run(name: str) -> RunSpec:
    """The run in four steps at width 16; dropout, schedules and optimiser are as in the file."""
    sizes = [text for text in shrinking(config.load(name)) if not text.endswith("dropout=0")]
    steps = [f"train.steps={STEPS}", f"train.save_every={HALF}", f"train.batch={ROWS}"]
    return config.load(name, [*sizes, *steps, "train.log_every=1", "validate.every=0"])


def train(spec: RunSpec, folder: Path, device: torch.device) -> None:
    folder.mkdir(exist_ok=True)
    parts = Parts(
        lambda: build_model(spec, VOCABULARY, SPECIAL, BEGINS),
        lambda layout: FakeLoader(spec),
        lambda *_: {},
    )
    fit(spec, parts, folder, device)


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_equal(
    name: str, device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = small_run(name)
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(spec, whole, device)
    half = f"checkpoints/step-{HALF:08d}"
    shutil.copytree(whole / half, part / half)
    lines = (whole / "log.jsonl").read_text().splitlines(keepends=True)
    (part / "log.jsonl").write_text("".join(lines[:HALF]))
    train(spec, part, device)
    assert f"from step {HALF}" in capsys.readouterr().out
    compare(whole, part, STEPS, averaged=spec.optim.ema != 0)
