"""Runs in stages: one command is the four, and goes on where it was interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from launching import TEST_LIMIT_S, checked, command_line, finish, start, wait_until
from safetensors.torch import load_file
from small_methods import shrinking
from tone_shards import write_tones

from data_tools import label_shards
from mmssl import check, config
from mmssl.data.sidecars import SideCar
from mmssl.stages import dump, load, plan
from mmssl.train import loop, run, stages
from mmssl.train.checkpoint import find
from mmssl.types import PREEMPTED, UserError

SCORES = [[0, 1, 2], [2, 0, 1], [1, 0, 2], [2, 1, 0]]
LABELS = ["clusters=3", "fit_share=1.0", "sweeps=1", "points=500", "restarts=1", "workers=0"]
TRAIN = ["data.workers=0", "train.steps=4", "train.batch=2", "train.log_every=1"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_tones(tmp_path_factory.mktemp("tones") / "train", SCORES)


def run_changes(number: int, name: str) -> list[str]:
    small = shrinking(config.load(f"hubert_it{number}_tiny"))
    return [*small, *TRAIN, "train.save_every=2", f"tasks.mam.target.classes.{name}=3"]


def small(shards: Path, out: Path, *more: str) -> list[str]:
    """Overrides that make the built-in file small."""
    labels = [f"{stage}.{text}" for stage in ("mfcc", "layer3") for text in LABELS]
    runs = [f"it{i}.{text}" for i, n in ((1, "mfcc"), (2, "it1")) for text in run_changes(i, n)]
    return [f"shards={shards}", f"out={out}", *labels, "layer3.layer=1", *runs, *more]


@pytest.fixture
def done(monkeypatch) -> list[str]:
    """What is labelled and trained, in order; labelling happens in this process."""
    seen: list[str] = []
    train = run.start

    def label(words: list[str], **_: object) -> SimpleNamespace:
        assert words[1:3] == ["-m", "data_tools.label_shards"]
        seen.append(Path(words[4]).parent.name)
        return SimpleNamespace(returncode=label_shards.main(words[3:]))

    def start(spec, device):
        seen.append(Path(spec.out).name)
        train(spec, device)

    monkeypatch.setattr(stages, "subprocess", SimpleNamespace(run=label))
    monkeypatch.setattr(stages.run, "start", start)
    return seen


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Path:
    """The four commands by hand."""
    out = tmp_path_factory.mktemp("by hand")
    words = [f"--{text.replace('_', '-')}" for text in LABELS]
    for number, name, more in (
        (1, "mfcc", ["--features=mfcc_cmvn"]),
        (2, "it1", [f"--features={out / 'it1'}", "--layer=1"]),
    ):
        car = out / f"{name}.safetensors"
        assert label_shards.main([str(shards), str(car), *words, *more]) == 0
        data = [f"data.train={shards}", f"data.frame_labels.{name}={car}"]
        changes = [*data, *run_changes(number, name), f"out={out / f'it{number}'}"]
        run.main(f"hubert_it{number}_tiny", changes)
    return out


def same(out: Path, whole: Path) -> None:
    for stage, name in (("mfcc", "mfcc"), ("layer3", "it1")):
        a, b = SideCar(out / stage / "labels.safetensors"), SideCar(whole / f"{name}.safetensors")
        assert len(a) == len(SCORES)
        assert all(np.array_equal(a.ids(key), b.ids(key)) for key in b)
    for stage in ("it1", "it2"):
        a, b = (load_file(find(f / stage, "last") / "weights.safetensors") for f in (out, whole))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), stage


def test_one_command_is_the_four_and_finished_stages_are_left_alone(
    shards, whole, done, tmp_path, capsys
):
    stages.main("hubert", small(shards, tmp_path))
    assert done == ["mfcc", "it1", "layer3", "it2"]
    same(tmp_path, whole)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    stages.main("hubert", small(shards, tmp_path))
    assert done == ["mfcc", "it1", "layer3", "it2"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before
    assert capsys.readouterr().out.count(" is finished -> ") == 4


def test_what_was_interrupted_goes_on_and_nothing_else_is_done_again(
    shards, whole, done, tmp_path, monkeypatch, capsys
):
    """Once in the third of four steps of the first run, once in front of the second labelling."""
    step, label = loop._step, stages._label

    def dying(spec, job, meters):
        if job.progress.step == 2:
            raise KeyboardInterrupt
        step(spec, job, meters)

    def dying_label(stage):
        if stage.name == "layer3":
            raise KeyboardInterrupt
        label(stage)

    for module, name, death in ((loop, "_step", dying), (stages, "_label", dying_label)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, death)
            with pytest.raises(KeyboardInterrupt):
                stages.main("hubert", small(shards, tmp_path))
    assert done == ["mfcc", "it1", "it1"]
    assert "4 steps of 2 clips, from step 2" in capsys.readouterr().out
    stages.main("hubert", small(shards, tmp_path))
    assert done == ["mfcc", "it1", "it1", "layer3", "it2"]
    same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_the_command_in_processes_of_its_own(shards, whole, tmp_path):
    words = ["-m", "mmssl.cli", "train", "hubert", *small(shards, tmp_path)]
    assert checked(words).count("labels -> ") == 2
    same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_request_ends_a_labelling_and_the_same_command_goes_on(shards, whole, tmp_path):
    """It comes to the command alone, or reaches the process that labels first."""
    words = ["-m", "mmssl.cli", "train", "hubert", *small(shards, tmp_path)]

    def labelling(process):
        found = psutil.Process(process.pid).children()
        return [child for child in found if "data_tools.label_shards" in command_line(child)]

    for number, to_command in ((signal.SIGTERM, True), (signal.SIGUSR1, False)):
        process = start([sys.executable, *words])
        wait_until(lambda p=process: labelling(p), "nothing is labelled")
        (child,) = labelling(process)
        (process if to_command else child).send_signal(number)
        ((code, said),) = finish(process)
        assert code == PREEMPTED, said
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running()
        assert json.loads((tmp_path / "mfcc" / "stage.json").read_text())["finished"] is False
    assert checked(words).count("labels -> ") == 2
    same(tmp_path, whole)


# ---------------------------------------------------------------- what is refused


def test_a_changed_stage_is_refused_with_its_keys_and_what_to_remove(shards, done, tmp_path):
    stages.main("hubert", small(shards, tmp_path))
    changed = small(shards, tmp_path, "it1.optim.lr=0.5", "it1.train.steps=5")
    with pytest.raises(UserError) as caught:
        stages.main("hubert", changed)
    text = str(caught.value)
    assert "hubert.yaml:9: `stages.it1`: " in text
    assert "(optim.lr was 0.001, is 0.5; train.steps was 4, is 5); choose another folder" in text
    folders = " ".join(str(tmp_path / name) for name in ("it1", "layer3", "it2"))
    assert f"or remove {folders} to do these stages again" in text
    # stages after one that was removed were made from another one
    for path in sorted((tmp_path / "mfcc").iterdir()):
        path.unlink()
    with pytest.raises(UserError, match=r"`stages\.it1`.*an earlier stage was another"):
        stages.main("hubert", small(shards, tmp_path, "mfcc.seed=1"))
    assert done == ["mfcc", "it1", "layer3", "it2"]


def test_a_damaged_mark_is_named(shards, tmp_path):
    (tmp_path / "mfcc").mkdir()
    (tmp_path / "mfcc" / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"stage\.json: is damaged: .*; remove .*mfcc"):
        stages.main("hubert", small(shards, tmp_path))


def test_a_failed_labelling_stops_the_command(tmp_path, monkeypatch):
    failed = SimpleNamespace(run=lambda *_, **__: subprocess.CompletedProcess([], 2))
    monkeypatch.setattr(stages, "subprocess", failed)
    with pytest.raises(UserError, match=r"`stages\.mfcc`: labelling ended with exit status 2"):
        stages.main("hubert", small(tmp_path / "none", tmp_path))
    assert json.loads((tmp_path / "mfcc" / "stage.json").read_text())["finished"] is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("it1.train.stepz=3", r"hubert\.yaml:9: `stages\.it1`: override .*`train.stepz`.*`steps`"),
        ("it1.train.steps", r"`stages\.it1`: override `train\.steps`: write it as key=value"),
        ("it1.out=x", r"`stages\.it1`: a stage has its folder below the file's `out`"),
        ("mfcc.clusterz=3", r"clusterz`: unknown key; did you mean `clusters`\?"),
        ("mfcc.fit_share=2", r"`stages\.mfcc\.label\.fit_share`: .*less than or equal to 1"),
        ("mfcc.clusters=[3,3]", r"`stages\.mfcc\.label\.clusters`: give one or several different"),
        ("mfcd.clusters=3", r"`mfcd`: unknown key"),
        ("shards=''", r"`stages\.mfcc`: label\.shards is empty"),
        ("layer3.clusters=9", r"classes\.it1=100: the stage `layer3` makes \[9\] clusters"),
        ("mfcc.clusters=9", r"classes\.mfcc=\[50, 200, 500\]: the stage `mfcc` makes \[9\]"),
        ("mfcc.features=${it1}", r"`stages\.mfcc`: .* key 'it1' not found; it can name shards \("),
        ("layer3.features=${mfcc}", r"features: the stage `mfcc` makes labels and no run"),
        (
            "it2.data.frame_labels.it1=${it1}/labels.safetensors",
            r"data\.frame_labels\.it1: the stage `it1` makes no labels",
        ),
        ("it2.data.frame_labels.it1=${mfcc}", r"it1=.*mfcc: labels are \$\{STAGE\}/labels"),
        ("stages.mfcc.train=hubert_it1_tiny", r"give either `train: RUN` or `label: \{\.\.\.\}`"),
        ("stages.mfcc.overrides=[a=1]", r"`overrides` belong to `train`"),
        ("stages.it1.train=hubert_it9", r"`stages\.it1`: hubert_it9: no such file"),
        ("stages.shards={train: hubert_it1_tiny}", r"`shards` cannot name a stage"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_first_stage(override, message, tmp_path):
    for verb in (stages.main, check.check, check.show):
        with pytest.raises(UserError, match=message):
            verb("hubert", [f"out={tmp_path / 'out'}", override])
    assert not (tmp_path / "out").exists()


def test_labels_of_given_clusterings_are_not_counted(tmp_path):
    changed = plan("hubert", ["mfcc.clusters=7", "mfcc.kmeans=[a.safetensors]"])
    assert changed[0].label.kmeans == (Path("a.safetensors"),)


def test_a_stage_may_be_named_by_its_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPS", "clips/train")
    found = plan("hubert", ["shards=x", "mfcc.shards=${oc.env:CLIPS}"])
    assert [found[0].label.shards, found[1].run.data.train] == ["clips/train", "x"]
    assert found[1].run.data.frame_labels == {"mfcc": "runs/hubert/mfcc/labels.safetensors"}


def test_the_record_writes_and_reads_itself(tmp_path):
    spec, _ = load("hubert", ["mfcc.clusters=[3,4]"])
    path = tmp_path / "again.yaml"
    path.write_text(dump(spec))
    assert load(path)[0] == spec
    assert spec.stages["mfcc"].label.clusters == (3, 4)
