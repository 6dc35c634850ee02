"""The corpus of the demo: exact search that is fair between modalities, kept between starts."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from demo_corpus import demo_shards
from embed_runs import embedding

from mmssl.demos.web import corpus as corpora
from mmssl.demos.web import fragments
from mmssl.demos.web.corpus import Query, ShardCorpus
from mmssl.types import UserError

CLIPS = 8


@pytest.fixture(scope="module")
def model():
    return embedding("tiny")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    lacks = (None, "audio", "video", "text")
    return demo_shards(tmp_path_factory.mktemp("corpus"), CLIPS, 2.5, lacks)


@pytest.fixture(scope="module")
def corpus(model, shards, tmp_path_factory):
    return ShardCorpus(model, shards, tmp_path_factory.mktemp("cache"), 100)


def by_hand(model, corpus, modality, source):
    """{(key, modality): best calibrated score} of one query, computed another way."""
    out = {}
    for target in corpus.modalities:
        space = model.model.space_for(modality, target)
        if modality == target:
            space = model.default_space
        asked = model.encode({modality: source}, space=space).double().numpy()
        keys = corpus.keys_with(target)
        vectors, owners = [], []
        for key in keys:
            record = corpus.record(key)
            given = record.captions[0] if target == "text" else record.video or record.sound
            for window in model.encode_windows({target: given}, spaces=[space]):
                vectors.append(window.vectors[space].double().numpy())
                owners.append(key)
        cosines = np.stack(vectors) @ asked
        for key, score in zip(owners, (cosines - cosines.mean()) / cosines.std(), strict=True):
            out[key] = max(out.get(key, -np.inf), score)
    return out


def test_search_is_exact_and_calibrated_by_pair_of_modalities(model, corpus):
    text = "a dog sleeps"
    expected = by_hand(model, corpus, "text", text)
    hits = corpus.search([corpora.query(model, "text", text)], CLIPS, corpus.modalities)
    assert {hit.key: hit.score for hit in hits} == pytest.approx(expected, abs=1e-3)
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert len({hit.key for hit in hits}) == len(hits) == CLIPS  # one window of each clip


def test_a_clip_is_found_by_its_own_window(model, corpus):
    for modality in corpus.modalities:
        for point in corpus.points(model.default_space):
            if point.modality != modality:
                continue
            asked = Query(modality, {model.default_space: torch.from_numpy(point.vector_D)})
            (hit,) = corpus.search([asked], 1, [modality])
            assert hit.cosine == pytest.approx(1.0, abs=1e-5)
            cosines = [
                float(p.vector_D @ point.vector_D)
                for p in corpus.points(model.default_space)
                if (p.key, p.start_s, p.modality) == (hit.key, hit.start_s, modality)
            ]
            assert cosines == [pytest.approx(1.0, abs=1e-5)]


def test_windows_follow_the_clip(corpus):
    spans = {}
    for point in corpus.points("avt"):
        spans.setdefault((point.key, point.modality), []).append((point.start_s, point.end_s))
    for (key, modality), found in spans.items():
        assert key in corpus.keys_with(modality)
        if modality == "text":
            assert found == [(0.0, 0.0)]
        else:
            starts, ends = zip(*found, strict=True)
            assert starts == pytest.approx((0.0, 1.0, 1.5), abs=0.05)
            assert np.subtract(ends, starts) == pytest.approx([1.0] * 3, abs=0.01)


def test_several_queries_add_up(model, corpus):
    one, two = (corpora.query(model, "text", text) for text in ("a dog", "rain at night"))
    alone = [{h.key: h.score for h in corpus.search([q], CLIPS, ["text"])} for q in (one, two)]
    both = {h.key: h.score for h in corpus.search([one, two], CLIPS, ["text"])}
    assert both == pytest.approx({key: alone[0][key] + alone[1][key] for key in both}, abs=1e-4)


def test_vectors_are_kept_by_model_and_shards(model, shards, tmp_path, monkeypatch):
    first = ShardCorpus(model, shards, tmp_path, 3)
    assert len(first.captions) == 3
    (file,) = tmp_path.iterdir()
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)  # the same shards elsewhere
    monkeypatch.setattr(corpora, "_embedded", None)  # is not called again
    again = ShardCorpus(model, copy, tmp_path, 3)
    for a, b in zip(first.points("avt"), again.points("avt"), strict=True):
        assert a[:5] == b[:5]
        assert (a.vector_D == b.vector_D).all()
    other = SimpleNamespace(hash="f" * 64)
    with pytest.raises(TypeError):  # another model is embedded anew
        ShardCorpus(other, shards, tmp_path, 3)
    file.write_bytes(b"no tensors")
    with pytest.raises(TypeError):  # and so is what was damaged
        ShardCorpus(model, shards, tmp_path, 3)


def test_what_is_not_compared_is_said(model, corpus):
    with pytest.raises(UserError, match="does not compare smell with text"):
        corpus.search([Query("smell", {})], 3, ["text"])


# ---------------------------------------------------------------- the map


def test_the_map_is_principal_and_repeatable(corpus):
    points = corpus.points("avt")
    places = fragments.principal(points, centred=False)
    x = np.stack([p.vector_D for p in points]).astype(float)
    x -= x.mean(0)
    values = np.linalg.eigvalsh(x.T @ x)
    assert (places**2).sum(0) == pytest.approx(values[::-1][:2])
    assert (places == fragments.principal(points, centred=False)).all()


def test_centred_modalities_have_one_mean(corpus):
    points = corpus.points("avt")
    places = fragments.principal(points, centred=True)
    for modality in corpus.modalities:
        chosen = [p.modality == modality for p in points]
        assert places[chosen].mean(0) == pytest.approx([0, 0], abs=1e-6)


def test_captions_cannot_bring_markup():
    point = corpora.Point("k", "text", 0.0, 0.0, "<script>x</script>", np.ones(2, np.float32))
    hit = corpora.Hit("k", "text", 0.0, 0.0, point.caption, 0.5, 1.0)
    drawn = fragments.corpus_map([point, point], np.zeros((2, 2)), "")
    for html in (drawn, fragments.results([hit], [None])):
        assert "<script" not in html
        assert "&lt;script&gt;" in html
