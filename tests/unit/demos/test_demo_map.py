"""The map of the corpus: principal directions of stored vectors, bounded, without markup."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from demo_corpus import demo_index, demo_shards

from mmssl.demos.web import desk as desks
from mmssl.demos.web import fragments
from mmssl.demos.web.fragments import Point
from mmssl.index.search import Hit
from mmssl.index.store import Index

CLIPS = 6


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    shards = demo_shards(folder, CLIPS, 2.5, (None, "audio", "video"))
    return Index.open(demo_index(shards, folder))


@pytest.fixture(scope="module")
def desk(index):
    model = SimpleNamespace(default_space="avt")
    return desks.Desk(model, index, "clips", None, 5.0)


@pytest.fixture(scope="module")
def points(index):
    columns = Point._fields
    keys = [key for key in index.keys if key[0] == "avt"]
    return [Point(**row) for key in keys for row in index.sample(key, columns, 100)]


def test_the_map_is_principal_and_repeatable(points):
    places = fragments.principal(points, centred=False)
    x = np.array([p.vector for p in points])
    x -= x.mean(0)
    values = np.linalg.eigvalsh(x.T @ x)
    assert (places**2).sum(0) == pytest.approx(values[::-1][:2])
    assert (places == fragments.principal(points, centred=False)).all()


def test_centred_modalities_have_one_mean(points):
    places = fragments.principal(points, centred=True)
    for modality in ("audio", "video", "text"):
        chosen = [p.modality == modality for p in points]
        assert places[chosen].mean(0) == pytest.approx([0, 0], abs=1e-6)


def test_the_dots_are_the_rows_of_the_index(desk, index, points):
    drawn, told = desk.explore("avt", ["text", "audio", "video"], True, "rain TIN")
    dots = re.findall(r'data-row="(\w+)" class="mmssl-(\w+?)( mmssl-faint)?"', drawn)
    assert sorted(dots) == sorted(
        (p.id, p.modality, "" if "tin" in p.caption else " mmssl-faint") for p in points
    )
    faint = [bool(dot[2]) for dot in dots]
    assert faint == sorted(faint, reverse=True)  # none lies over a bright one and takes its clicks
    assert re.findall(r"(\w+)</span> (\d+) windows", told) == [
        ("audio", "12"), ("video", "12"), ("text", "6"),
    ]  # fmt: skip
    assert desk.held == {"audio": 12, "video": 12, "text": 6}
    assert desk.spaces == ["avt", "av"]


def test_large_corpora_are_sampled(desk, index, monkeypatch):
    monkeypatch.setattr(desks, "_POINTS", 5)
    drawn, told = desk.explore("avt", ["text", "audio"], True, None)
    shown = re.findall(r'data-row="(\w+)"', drawn)
    assert len(set(shown)) == len(shown) == 10
    assert "5 of 12 windows" in told
    assert "5 of 6 windows" in told
    every = [row["id"] for row in index.sample(("avt", "audio"), ["id"], 100)]
    assert [every.index(name) for name in shown[:5]] == [0, 2, 5, 8, 11]  # evenly, ends included


def test_captions_and_reasons_cannot_bring_markup():
    text = "<script>x</script>"
    point = Point("a1", "text", 0.0, 0.0, text, np.ones(2, np.float32))
    hit = Hit(1.0, 0.5, "s", "text", text, "k", 0.0, 0.0, 0.0, text, [], "", "", 0)
    drawn = fragments.corpus_map([point, point], np.zeros((2, 2)), "")
    for html in (drawn, fragments.results([hit], [""]), fragments.missing(b"jpeg", text)):
        assert "<script" not in html
        assert "&lt;script&gt;" in html
