"""`mmssl eval probe|knn|finetune` on shards of tones with tiny runs."""

import copy

import numpy as np
import pytest
import torch
from eval_runs import tone_rows, tone_run
from tone_shards import write_tones

from mmssl.data.ordered import places
from mmssl.eval import features, finetune, results, suites
from mmssl.eval.folds import read_labels
from mmssl.eval.session import Session
from mmssl.types import UserError

LABELLED = ["label=tone", "fold=fold", "resamples=20"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    return tone_run(tmp_path, monkeypatch)


@pytest.mark.parametrize("suite", ["probe", "knn"])
def test_tones_are_told_apart(run, capsys, suite):
    suites.main(suite, str(run), LABELLED)
    found = results.read(run / f"results_{suite}.json")
    items = results.read(run / f"items_{suite}.json")["values"]
    best = found[suite] if suite == "probe" else found[suite]["k1"]
    assert best["mean"] == 1.0  # three pure tones: even random weights hear the difference
    assert set(best["folds"]) == {"0", "1", "2"}
    assert best["ci"]["mean"] == [1.0, 1.0]
    assert suite in found["random_encoder"]
    trivial = found["trivial"][suite]
    assert trivial["majority"]["mean"] == pytest.approx(1 / 3)
    signal = trivial["signal"] if suite == "probe" else trivial["signal"]["k1"]
    assert signal["mean"] == 1.0
    column = next(iter(items.values()))
    assert (len(column), np.mean(list(column.values()))) == (18, 1.0)
    assert len(found["checkpoint"]["sha256"]) == len(found["data"]["manifest_sha256"]) == 64
    assert (found["protocol"], found["seed"], found["data"]["n"]) == (results.PROTOCOL, 0, 18)
    assert found["options"]["label"] == "tone"
    printed = capsys.readouterr().out
    assert "majority" in printed
    assert '<svg class="lines"' in (run / f"report_{suite}.html").read_text()


def test_neighbours_without_folds_leave_out_the_own_source(run):
    suites.main("knn", str(run), ["label=tone", "random=false", "report=false", "resamples=0"])
    found = results.read(run / "results_knn.json")
    assert list(found["knn"]["k1"]["folds"]) == ["all"]
    assert "random_encoder" not in found
    assert "k200" not in found["knn"]  # there are 17 others


def test_layers(run):
    def session(**options):
        return Session.open(run, features.FeatureSpec(resamples=0, **options))

    def of(**options):
        return features.clip_features(session(**options)).values["trained"]

    assert of(layer="all").shape == of(layer="last").shape == (18, 16)  # there is one layer
    assert np.array_equal(of(layer="1"), of(layer="last"))
    assert not np.allclose(of(layer="last"), of(layer="output"))  # a final norm lies between
    with pytest.raises(UserError, match="layer=2: the tower has 1 transformer layers"):
        of(layer="2")
    assert features.clip_features(session(), "mean_std").values["trained"].shape == (18, 32)


def test_pooled_is_over_valid_tokens_only():
    x = torch.tensor([[[1.0], [3.0], [99.0]], [[1.0], [2.0], [6.0]]])
    pad = torch.tensor([[False, False, True], [False, False, False]])
    assert features.pooled(x, pad).tolist() == [[2.0], [3.0]]
    assert torch.allclose(
        features.pooled(x, pad, "mean_std"), torch.tensor([[2, 1], [3, (14 / 3) ** 0.5]])
    )


def test_signal_frames_of_every_modality(run):
    session = Session.open(run, features.FeatureSpec(resamples=0))
    name, view = session.view_of("audio")
    batch = next(iter(session.batches({name: view.model_copy(update={"crop_s": 0.0})})))
    frames = features.signal_frames(batch.views[name], 0)
    assert frames.shape == (101, 64)
    assert features.signal_statistics(batch.views[name]).shape == (18, 256)
    words = copy.copy(batch.views[name])
    words.modality, words.data = "text", torch.tensor([[3, 515]])
    words.lengths_P = torch.tensor([2])
    assert features.signal_frames(words, 0).argmax(1).tolist() == [3, 3]
    film = copy.copy(words)
    film.modality, film.data = "video", torch.full((1, 2, 8, 8, 3), 255, dtype=torch.uint8)
    assert torch.equal(features.signal_frames(film, 0), torch.ones(2, 48))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["label=pitch", "fold=fold"], "label=pitch: no clip of this data has that field"),
        (["label=tone"], "give fold=FIELD, a field of the clips' meta; there are captions"),
        (["fold=fold"], "give label=FIELD, a field of the clips' meta; there are captions"),
        (["label=source_kind", "fold=fold"], "there are captions, duration_s, fold, has"),
        (["label=tone", "fold=fold", "modality=text"], "no view of text, only of audio, video"),
        (["label=tone", "fold=fold", "modality=video"], "no clip holds video"),
        (["label=tone", "fold=voice"], "only the folds voice0, voice1; three are needed"),
        (["labels=tone"], "did you mean `label"),
    ],
)
@pytest.mark.parametrize("suite", ["probe", "finetune"])
def test_bad_input(run, suite, words, message):
    with pytest.raises(UserError, match=message):
        suites.main(suite, str(run), [*words, "random=false"])


@pytest.mark.parametrize(
    ("suite", "words"),
    [
        ("probe", ["label=tone", "fold=no"]),
        ("knn", ["label=tone", "fold=no"]),
        ("abx", ["label=tone", "speaker=no"]),
        ("retrieval", ["split_by=no"]),
    ],
)
def test_fields_that_no_clip_has_are_refused_before_anything_is_decoded(
    run, monkeypatch, suite, words
):
    decoded = []
    monkeypatch.setattr(
        Session, "batches", lambda self, views=None, *_: decoded.append(views) or whole(self, {})
    )
    with pytest.raises(UserError, match="=no: no clip of this data has that field; there are"):
        suites.main(suite, str(run), [*words, "random=false"])
    assert decoded == [{}]


whole = Session.batches


def test_fine_tuning_learns_where_its_frozen_start_knows_nothing(run):
    words = ["shares=100", "steps=10", "batch=6", "lr=3e-3", "report=false"]
    suites.main("finetune", str(run), [*LABELLED, *words])
    found = results.read(run / "results_finetune.json")
    whole = found["finetune"]["100"]
    assert whole["mean"] > 0.8
    assert whole["labels"] == {"0": 6, "1": 6, "2": 6}
    assert found["random_encoder"]["finetune"]["100"]["n"] == 18
    assert found["trivial"]["finetune"]["majority"]["mean"] == pytest.approx(1 / 3)
    (drawn,) = found["plots"]
    assert drawn["x"] == [100.0]
    assert drawn["lines"]["trained"][0] == whole["mean"]


def test_fine_tuning_moves_a_copy_of_the_tower(run):
    options = finetune.Options(label="tone", fold="fold", steps=2, batch=4, random=False)
    session = Session.open(run, options)
    rows, _ = finetune.labelled(session, options)
    labels, _ = read_labels(rows.meta, "tone")
    clips = finetune.Clips(session, options, labels, rows.keys)
    model = session.models["trained"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    tuned = finetune.train(clips, model, np.arange(18), np.arange(6), 0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    moved = dict(tuned.named_parameters())
    kept = {f"tower.{n}": p for n, p in model.towers["audio"].named_parameters()}
    kept |= {f"trunk.{n}": p for n, p in model.trunk.named_parameters()}
    assert set(moved) == {*kept, "head.weight", "head.bias"}  # the shared trunk is trained, too
    changed = [name for name, p in kept.items() if not torch.equal(p, moved[name])]
    assert any(name.startswith("trunk.blocks") for name in changed)
    assert any(name.startswith("tower.stem") for name in changed)


@pytest.fixture
def unreadable(monkeypatch):
    """Numbers of clips that `Clips.read` leaves out."""
    gone, plain = [], finetune.Clips.read
    monkeypatch.setattr(
        finetune.Clips, "read", lambda self, rows, n: plain(self, rows[~np.isin(rows, gone)], n)
    )
    return gone


def test_test_clips_that_cannot_be_read_are_missing(run, unreadable):
    unreadable[:] = [2, 4]  # of the classes 0 and 2
    options = finetune.Options(label="tone", fold="fold", shares="100", steps=2, batch=4)
    session = Session.open(run, options.model_copy(update={"random": False, "resamples": 5}))
    result = finetune.evaluate(session)
    found, majority = result["finetune"], result["trivial"]["finetune"]["majority"]
    assert (found["n"], found["n_missing"], found["100"]["n"], majority["n"]) == (16, 2, 16, 16)
    assert [part["n"] for part in found["100"]["folds"].values()] == [5, 5, 6]
    hits = session.items.values["finetune.100.hit"]
    assert len(hits) == 16
    assert np.mean([*hits.values()]) == pytest.approx(
        sum(part["n"] * part["accuracy"] for part in found["100"]["folds"].values()) / 16
    )
    unreadable[:] = range(3, 6)
    unreadable += range(12, 15)
    with pytest.raises(UserError, match="none of the 6 clips of the `dev` part could be read"):
        finetune.evaluate(session)


def test_looks_at_dev_leave_out_what_cannot_be_read(run, unreadable):
    options = finetune.Options(label="tone", fold="fold", random=False)
    session = Session.open(run, options)
    rows, _ = finetune.labelled(session, options)
    labels, _ = read_labels(rows.meta, "tone")
    clips = finetune.Clips(session, options, labels, rows.keys)
    tuned = finetune.Tuned(session.models["trained"], clips.name, 3)
    tuned.head.bias.data[1] = 1.0  # always the second class
    unreadable[:] = np.flatnonzero(labels.ids_N == 0)[:5]
    assert finetune._value(clips, tuned, np.arange(18)) == pytest.approx(6 / 13)
    tuned.head.bias.data[1] = torch.nan
    with pytest.raises(UserError, match=r"scores that are not finite; lower lr=0\.0001"):
        finetune._value(clips, tuned, np.arange(18))


@pytest.mark.parametrize("shares", ["0", "1,101", "a,b", ""])
def test_shares_are_per_cent(run, shares):
    with pytest.raises(UserError, match="numbers above 0, at most 100"):
        suites.main("finetune", str(run), [*LABELLED, f"shares={shares}"])


def test_places_find_every_sample(tmp_path):
    scores, metas = tone_rows(repeats=2)
    shards = write_tones(tmp_path / "train", scores, metas=metas)
    from mmssl.specs import DataSpec

    found = places(shards, DataSpec())
    assert sorted(found.values()) == list(range(6))
    assert sorted(found, key=found.get) == sorted(found)  # the manifest's order
