"""`show` and `check`: the table of a run, and every problem named before a run is started."""

import json
import re
import wave

import numpy as np
import pytest
import torch
from small_methods import shrinking, small, small_model
from tiny_run import TREE, tiny_model, tiny_spec
from torch import nn

from data_tools.make_shards import make_shards
from mmssl import check, config
from mmssl.data.ordered import eval_batches
from mmssl.data.sidecars import LabelInfo, Source, shards_digest, writing
from mmssl.frontends import SpectrumParams
from mmssl.frontends.spectra import LogMel
from mmssl.specs import DataSpec
from mmssl.stages import is_staged, plan
from mmssl.train import run
from mmssl.types import UserError
from mmssl.yamlfile import write_yaml

STAGED = [name for name in config.names() if is_staged(name)]
BUILT_IN = sorted(set(config.names()) - set(STAGED))


@pytest.fixture
def tiny_file(tmp_path):
    """Writes the tiny run with some of its entries replaced."""

    def write(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(write_yaml(TREE | changes))
        return str(path)

    return write


# ---------------------------------------------------------------- show


def test_show_prints_what_is_read_and_what_is_learned(capsys, tiny_file):
    check.show(tiny_file())
    lines = capsys.readouterr().out.splitlines()
    model = tiny_model()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    digest = config.digest(tiny_spec())
    assert lines[0] == f"tiny  (config {digest}, {count:.2f} M parameters)"
    rows = {tuple(re.split(r"\s{2,}", line)) for line in lines}
    assert ("video", "clip", "4 x 16 x 16 x 3", "video", "2 x 2 x 2", "16") in rows
    assert ("audio", "clip", "16000", "audio", "25 x 1", "16") in rows
    assert ("align.dense", "pairs", "video ~ audio", "info_nce on the map", "1.0 x 1.0") in rows
    assert ("align.vt", "pairs", "video ~ text", "sigmoid on dot in avt", "1.0 x 1.0") in rows
    assert ("match", "classify", "video ~ audio", "match by joint", "1.0") in rows
    assert ("masked_video", "masked", "video", "patches, tubes 0.5", "1.0") in rows


def test_a_future_task_is_shown_with_what_it_predicts(capsys):
    check.show("cpc2_tiny")
    assert "past -> clean  latents, 8 steps" in capsys.readouterr().out


def test_show_honours_overrides(capsys, tiny_file):
    check.show(tiny_file(), ["views.video.size=32", "tasks.match.weight=0.2"])
    out = capsys.readouterr().out
    assert "4 x 32 x 32 x 3" in out
    assert "2 x 4 x 4" in out
    assert re.search(r"match by joint\s+0.2", out)


def test_a_label_task_is_shown_with_its_field(capsys, tiny_file):
    label = {"kind": "label", "view": "audio", "field": "shape", "classes": ["circle", "square"]}
    tasks = {"shape": {"kind": "classify", "target": label, "pool": "mean"}}
    check.show(tiny_file(tasks=tasks, data={"labels": ["shape"]}))
    assert "label shape" in capsys.readouterr().out


# ---------------------------------------------------------------- check


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_and_run_passes_at_a_small_size(name, capsys):
    check.check(name, shrinking(config.load(name)))
    out = capsys.readouterr().out
    assert out.endswith("ok: every parameter is used, every term is finite\n")
    for task in config.load(name).tasks:
        assert task in out


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_and_run_shows_its_views(name, capsys):
    spec = config.load(name)
    check.show(name, shrinking(spec))
    out = capsys.readouterr().out
    assert all(re.search(rf"^{view}  ", out, re.MULTILINE) for view in spec.views)


@pytest.mark.parametrize("name", STAGED)
def test_every_stage_is_checked_and_shown(name, capsys):
    stages = plan(name)
    small = [f"{s.name}.{text}" for s in stages if s.run is not None for text in shrinking(s.run)]
    check.show(name, small)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[s.name, "train" if s.run else "label"] for s in stages]
    check.check(name, small)
    out = capsys.readouterr().out
    runs = [s for s in stages if s.run is not None]
    assert out.count("ok: every parameter is used") == len(runs) > 0
    assert all(s.run.name in out for s in runs)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_mel_band_of_a_built_in_run_hears_something(name):
    """Too many bands for the transform's frequencies leave some that never change."""
    for tower in config.load(name).towers.values():
        if tower.frontend.kind == "log_mel":
            params = SpectrumParams(**tower.frontend.model_dump(exclude={"kind", "utterance"}))
            bank = LogMel(params)._transform().mel_scale.fb
            assert float(bank.sum(0).min()) > 0


def test_a_tower_that_no_task_reads_is_refused_by_its_parameters(tiny_file):
    tasks = {"masked_audio": TREE["tasks"]["masked_audio"]}
    with pytest.raises(UserError, match=r"unused parameters .*towers\.video\.stem"):
        check.check(tiny_file(tasks=tasks, joints={}))


def test_a_tower_that_no_view_reads_is_refused_by_its_name(tiny_file):
    towers = {**TREE["towers"], "ears": TREE["towers"]["audio"]}
    with pytest.raises(UserError, match=r"towers\.ears: no view reads this tower"):
        check.check(tiny_file(towers=towers))


def test_a_joint_tower_that_no_task_reads_is_refused(tiny_file):
    tasks = {k: v for k, v in TREE["tasks"].items() if k != "match"}
    with pytest.raises(UserError, match=r"unused parameters joints\.av"):
        check.check(tiny_file(tasks=tasks))


class Odd(nn.Module):
    """Holds something of shape ()."""

    def __init__(self, parameter):
        super().__init__()
        value = torch.zeros(())
        if parameter:
            self.gain = nn.Parameter(value)
        else:
            self.register_buffer("gain", value)


@pytest.mark.parametrize("parameter", [True, False])
def test_tensors_without_a_dimension_are_refused(parameter, tiny_file, monkeypatch):
    model = tiny_model()
    model.tasks["match"].odd = Odd(parameter)
    monkeypatch.setattr(check, "_model", lambda spec: model)
    with pytest.raises(UserError, match=r"tasks\.match\.odd\.gain has no dimension.*shape \(1,\)"):
        check.check(tiny_file())


def test_a_term_that_is_not_finite_is_named_and_no_other(tiny_file, monkeypatch):
    model = tiny_model()
    with torch.no_grad():
        model.tasks["masked_text"].target.head.layers[-1].bias[7] = float("nan")
    monkeypatch.setattr(check, "_model", lambda spec: model)
    with pytest.raises(UserError) as caught:
        check.check(tiny_file())
    terms = str(caught.value).split("terms are not finite: ")[1]
    assert terms == "masked_text is nan"
    assert "gradient is not finite in" in str(caught.value)


def test_problems_are_told_all_at_once(tiny_file, monkeypatch):
    model = tiny_model()
    model.tasks["match"].odd = Odd(True)
    with torch.no_grad():
        model.tasks["masked_text"].target.head.layers[-1].bias[7] = float("inf")
    monkeypatch.setattr(check, "_model", lambda spec: model)
    with pytest.raises(UserError, match=r"no dimension.*; unused parameters.*; terms are not"):
        check.check(tiny_file())


# ---------------------------------------------------------------- frame labels


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four seconds of noise, in four clips."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for k in range(4):
        with wave.open(str(folder / f"{k}.wav"), "wb") as out:
            out.setparams((1, 2, 16000, 0, "NONE", ""))
            out.writeframes(rng.integers(-9999, 9999, 16000).astype("<i2").tobytes())
    lines = [json.dumps({"media": f"{k}.wav", "source": f"s{k}"}) for k in range(4)]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    make_shards(folder, folder / "shards", workers=1)
    return folder / "shards"


@pytest.fixture
def labelled(shards, tmp_path):
    """Writes a side-car that gives every clip the same ids; returns the overrides that name it."""

    def write(ids, rate=100.0, classes=100, unread=0, digest=None):
        (batch,) = eval_batches(shards, DataSpec(), {}, 9, None, workers=0)
        path = tmp_path / "l.safetensors"
        info = LabelInfo(Source("mfcc", rate), (classes,), digest or shards_digest(shards))
        with writing(path, info) as writer:
            for key in batch.keys[unread:]:
                writer.add(key, np.reshape(ids, (-1, 1)), len(ids) / rate)
        return [f"data.train={shards}", f"data.frame_labels.mfcc={path}", "data.workers=0"]

    return write


EVEN = list(range(100))
BAD = [
    ({"ids": [7] * 100}, r"mfcc: .*l\.safetensors: uses 1 of 100 classes: nothing to pred"),
    ({"ids": [7] * 80 + EVEN[:20]}, r"class 7 holds 81\.0% of the labels .*; cluster again"),
    ({"ids": EVEN, "unread": 1}, r"1 of 4 samples have no label .*; label the shards that are"),
    ({"ids": EVEN[:80], "rate": 80.0}, r"labels at 80 Hz for a model of 50 frames .*: label with"),
    (
        {"ids": EVEN, "classes": 101},
        r"tasks\.mam\.target\.classes\.mfcc: \[100\] classes, but .*l\.safetensors has \[101\]",
    ),
    ({"ids": EVEN, "digest": "0"}, r"data\.frame_labels\.mfcc: .* labels of other shards than"),
]


def hubert(*overrides):
    return [*shrinking(config.load("speech/hubert_it1")), "train.batch=2", *overrides]


def test_good_labels_pass(labelled, capsys):
    overrides = hubert(*labelled(EVEN))
    check.check("speech/hubert_it1", overrides)
    assert "not checked" not in capsys.readouterr().out
    spec = config.load("speech/hubert_it1", overrides)
    assert check.judge_labels(small_model(spec), spec) == ([], [])


@pytest.mark.parametrize(("what", "message"), BAD)
def test_degenerate_labels_are_refused_before_training(what, message, labelled, tmp_path):
    overrides = hubert(*labelled(**what), f"out={tmp_path / 'run'}", "train.threads=1")
    with pytest.raises(UserError, match=message):
        check.check("speech/hubert_it1", overrides)
    with pytest.raises(UserError, match=message):
        run.main("speech/hubert_it1", overrides)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_labels_are_looked_at_without_their_shards(labelled):
    (_, car, _) = labelled([7] * 100)
    with pytest.raises(UserError, match="uses 1 of 100 classes"):
        check.check("speech/hubert_it1", hubert(car))


def test_clips_that_are_clustered_are_counted_in_the_shards(shards):
    def judged(clips, *more):
        name = "deep_cluster_tiny"
        spec = small(name, f"tasks.cluster.target.clips={clips}", f"data.train={shards}", *more)
        return check.judge_labels(small_model(spec), spec).problems

    assert judged(4) == judged(8) == []
    what = f"tasks.cluster.target.clips: {{}}, but the clips of {shards} have the numbers up to 3"
    assert judged(3) == [what.format(3) + "; give 4"]
    assert judged(9) == [what.format(9) + "; give 4"]
    assert judged(9, "data.train=nowhere") == []


def test_labels_that_are_not_there_are_named(shards, tmp_path, capsys):
    train = f"data.train={shards}"
    for given, message in (
        ([], r"classes\.mfcc: data\.frame_labels\.mfcc names no side-car; make one with"),
        (["data.frame_labels.mfcc=gone"], r"frame_labels\.mfcc names gone, which is not there"),
    ):
        check.check("speech/hubert_it1", hubert(train, *given))
        assert re.search(f"not checked: .*{message}", capsys.readouterr().out)
        spec = config.load("speech/hubert_it1", hubert(train, *given))
        with pytest.raises(UserError, match=message):
            check.need_labels(small_model(spec), spec)


# ---------------------------------------------------------------- the made-up batch


def test_the_first_rows_lack_one_modality_each():
    batch = check.fake_batch(tiny_spec(), rows=5)
    lacking = {name: (~v.present_B).nonzero().flatten().tolist() for name, v in batch.views.items()}
    assert lacking == {"text": [0], "audio": [1], "video": [2]}
    assert batch.text_B.tolist() == [0, 2, 3, 4, 5]
    full = check.fake_batch(tiny_spec(), rows=5, missing=False)
    assert all(v.present_B.all() for v in full.views.values())


def test_the_batch_has_the_shape_of_the_views():
    spec = small("avt/vatt_mbs")
    batch = check.fake_batch(spec, rows=2, missing=False)
    assert batch.views["text"].data.shape == (10, 8)  # five candidates of a row
    assert batch.views["text"].slots_P.tolist() == [0, 1, 2, 3, 4] * 2
    assert batch.views["video"].data.shape == (2, 8, 32, 32, 3)
    assert batch.views["audio"].data.shape == (2, 6400)
    again = check.fake_batch(spec, rows=2, missing=False)
    assert torch.equal(batch.views["audio"].data, again.views["audio"].data)


def test_labels_of_the_run_are_made_up_too():
    label = {"kind": "label", "view": "audio", "field": "shape", "classes": ["circle", "square"]}
    tasks = {"shape": {"kind": "classify", "target": label}}
    batch = check.fake_batch(tiny_spec(tasks=tasks), rows=3)
    assert batch.meta == [{"shape": "circle"}, {"shape": "square"}, {"shape": "circle"}]
