"""mmssl search: against a full sort in numpy, calibrated over modalities, filtered, combined."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from embed_runs import run_folder
from index_runs import embedded, rows_of
from media_files import moving_frames, tone, write_media
from PIL import Image

from mmssl import cli
from mmssl.index import build, search
from mmssl.index.search import SearchSpec
from mmssl.index.store import Index, Record, table_name
from mmssl.types import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def found(place):
    """Searches the library with any queries and options."""
    index = Index.open(place.library)
    model = search.load_model(index)

    def ask(*words, **options):
        queries = [search.query_of(str(word)) for word in words]
        options = SearchSpec.model_validate({"k": 1000, **options})
        return search.search(index, model, queries, options)

    return ask


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_exact_search_is_a_full_sort_of_the_scores(place, found):
    """From the files of vectors: cosines, standardised among all rows of a modality."""
    query = place.model.encode("a dog barks", space="avt").double().numpy()
    rows = [r for r in embedded(place.library / "vectors") if r["space"] == "avt"]
    wanted = []
    for modality in ("audio", "video", "text"):
        of = [r for r in rows if r["modality"] == modality]
        cosines = unit(np.array([r["vector"] for r in of], dtype=np.float64)) @ query
        scores = (cosines - cosines.mean()) / cosines.std()
        wanted += [(s, c, r["key"]) for s, c, r in zip(scores, cosines, of, strict=True)]
    wanted.sort(key=lambda each: -each[0])
    hits = found("a dog barks", space="avt")
    assert len(hits) == len(wanted) == 23
    np.testing.assert_allclose([h.score for h in hits], [s for s, _, _ in wanted], atol=1e-4)
    np.testing.assert_allclose([h.cosine for h in hits], [c for _, c, _ in wanted], atol=1e-6)
    assert [h.key for h in hits] == [key for _, _, key in wanted]


def test_the_first_k_are_the_first_of_all(found):
    everything = found("the sea at night")
    for k in (1, 5, 12):
        assert found("the sea at night", k=k) == everything[:k]
    assert [h.score for h in everything] == sorted((h.score for h in everything), reverse=True)


def test_of_every_clip_the_best_hit_alone(place, found, monkeypatch):
    """The same as of all hits the first of each clip, however few windows are asked for."""
    index = Index.open(place.library)
    model = search.load_model(index)
    best = {}
    for hit in found("the sea at night"):
        best.setdefault(hit.key, hit)
    for k in (1, 3, 7, 10, 100):
        options = SearchSpec(k=k)
        hits = search.search(index, model, [{"text": "the sea at night"}], options, once=True)
        assert hits == list(best.values())[:k]
    assert len(best) == 10


def test_clips_and_pictures_as_queries(place, found):
    """With the cosines that the interface gives; a picture is a video of one frame."""
    clip = place.folder / "media" / "clip004.mp4"
    for modality in ("audio", "video"):
        query = place.model.encode({"audio": clip, "video": clip}, space="av").numpy()
        hits = found(clip, space="av", modality=modality)
        own = next(hit for hit in hits if hit.caption == "4 dogs")
        alone = place.model.encode_windows({"audio": clip, "video": clip}, spaces=["av"])
        vector = next(w.vectors["av"].numpy() for w in alone if w.modality == modality)
        assert own.cosine == pytest.approx(float(vector @ query), abs=1e-5)
    Image.fromarray(moving_frames(10, 32, 32, seed=4)[5]).save(place.folder / "frame.png")
    picture = {"video": (np.array(Image.open(place.folder / "frame.png"))[None], 1.0)}
    query = place.model.encode(picture, space="av").double().numpy()
    rows = [r for r in rows_of(place.library).values() if r["space"] == "av"]
    cosines = [unit(np.array(r["vector"])) @ query for r in rows if r["modality"] == "video"]
    hits = found(place.folder / "frame.png", space="av", modality="video")
    np.testing.assert_allclose([h.cosine for h in hits], sorted(cosines)[::-1], atol=1e-6)


def test_several_queries_are_the_sum_of_their_vectors(place, found):
    clip = place.folder / "media" / "clip001.m4a"
    model = place.model
    parts = [model.encode({"audio": clip}, space="avt"), model.encode("rain falls", space="avt")]
    query = unit(sum(parts).double().numpy())
    hits = found(clip, "rain falls", space="avt", modality="video")
    of = [r for r in rows_of(place.library).values()]
    of = {r["key"]: r for r in of if (r["space"], r["modality"]) == ("avt", "video")}
    for hit in hits:
        assert hit.cosine == pytest.approx(
            float(unit(np.array(of[hit.key]["vector"])) @ query), abs=1e-5
        )
    assert found("rain falls", clip, space="avt", modality="video") == hits
    assert found(clip, space="avt", modality="video")[0].cosine != pytest.approx(hits[0].cosine)


# ---------------------------------------------------------------- spaces


def test_each_pair_of_modalities_is_searched_where_it_was_trained(place, found):
    """The tiny run trains video-audio in `av`, both against text in `avt`."""
    clip = place.folder / "media" / "clip001.m4a"
    spaces = {(h.modality, h.space) for h in found(clip)}
    assert spaces >= {("video", "av"), ("text", "avt")}
    assert {h.space for h in found("a cat sleeps")} == {"avt"}
    assert {h.space for h in found(clip, "a cat sleeps")} == {"avt"}


def test_sounds_are_found_by_words_through_fac(place, tmp_path):
    """FAC (Alayrac et al. 2020) never trains audio against text; both have the coarse space."""
    run_folder(tmp_path / "run", "avt/mmv_fac")
    shards = str(place.folder / "shards")
    build.main("build", shards, [f"model={tmp_path}/run", f"out={tmp_path}/db"])
    index = Index.open(tmp_path / "db")
    model = search.load_model(index)
    fine = model.model.space_for("audio", "video")
    coarse = model.model.space_for("video", "text")
    assert fine != coarse
    asked = [search.query_of("rain")]
    hits = search.search(index, model, asked, SearchSpec(modality="audio", k=99))
    assert {(h.space, h.modality) for h in hits} == {(coarse, "audio")}
    assert len({hit.key for hit in hits}) == 8
    sound = [search.query_of(str(place.folder / "media" / "clip001.m4a"))]
    hits = search.search(index, model, sound, SearchSpec(modality="video", k=99))
    assert {h.space for h in hits} == {fine}


# ---------------------------------------------------------------- calibration


def planted(folder, sound_gap, rows=300, dim=24):
    """An index of random vectors; the last axis is the gap, which sounds and texts differ in."""
    rng = np.random.default_rng(0)
    index = Index(folder, Record("hash", "run", "ema"))
    gaps = {"audio": sound_gap, "text": 0.3}
    for modality, gap in gaps.items():
        vectors = unit(rng.standard_normal((rows, dim)))
        vectors = unit(np.concatenate([vectors, np.full((rows, 1), gap)], 1)).astype(np.float32)
        columns = {"key": [f"{modality}{k}" for k in range(rows)], "modality": [modality] * rows}
        for name in ("source", "caption", "folder", "shard"):
            columns[name] = [""] * rows
        columns |= {n: [0.0] * rows for n in ("start_s", "end_s", "duration_s")}
        columns |= {"number": [0] * rows, "meta": [[""]] * rows, "thumbnail": [b""] * rows}
        columns["vector"] = pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), dim + 1)
        data = pa.table(columns)
        index.record.spaces.setdefault("s", []).append(modality)
        index.table(("s", modality), data.schema).add(data)
    index.save_moments()
    return index


def test_a_gap_between_modalities_changes_no_ranking(tmp_path):
    """A constant added to all sounds moves every cosine, and no score."""
    query = torch.from_numpy(unit(np.random.default_rng(1).standard_normal((1, 25)))).float()
    model = SimpleNamespace(
        spaces={"s": ("audio", "text")},
        encode=lambda *_, **__: query,
        model=SimpleNamespace(space_for=lambda *_: "s"),
    )
    orders, cosines = [], []
    for name, gap in (("near", 0.0), ("far", 3.0), ("behind", -2.0)):
        index = planted(tmp_path / name, gap)
        hits = search.search(index, model, [{"text": "x"}], SearchSpec(k=100))
        orders.append([hit.key for hit in hits])
        scores = [hit.score for hit in hits]
        cosines.append([h.key for h in sorted(hits, key=lambda h: -h.cosine)])
        assert {hit.modality for hit in hits} == {"audio", "text"}
        if name == "near":
            first = scores
        np.testing.assert_allclose(scores, first, atol=2e-4)
    assert orders[0] == orders[1] == orders[2]
    assert cosines[0] != cosines[1]  # by cosine alone the sounds would have moved


def test_scores_have_mean_zero_and_deviation_one(tmp_path):
    index = planted(tmp_path, 1.0)
    vectors = np.stack(index.table(("s", "audio")).to_arrow()["vector"].to_pylist())
    for seed in range(3):
        query = unit(np.random.default_rng(seed).standard_normal(25)).astype(np.float32)
        scores = index.scores(("s", "audio"), query, vectors @ query.astype(np.float64))
        assert scores.mean() == pytest.approx(0, abs=1e-4)
        assert scores.std() == pytest.approx(1, abs=1e-4)


# ---------------------------------------------------------------- filters, output


def test_conditions(place, found):
    rows = [r for r in rows_of(place.library).values() if r["space"] == "avt"]

    def kept(condition):
        return sorted({r["key"] for r in rows if condition(r)})

    def asked(**options):
        return sorted({h.key for h in found("a dog", space="avt", **options)})

    assert asked(where="source = 'source 1'") == kept(lambda r: r["source"] == "source 1")
    assert asked(where="key LIKE 'source_2%'") == kept(lambda r: r["key"].startswith("source_2"))
    assert asked(where="array_has(meta, 'number=4')") == kept(lambda r: "number=4" in r["meta"])
    assert asked(where="duration_s > 5") == []
    assert asked(where="duration_s < 5", modality="video") == kept(
        lambda r: r["duration_s"] < 5 and r["modality"] == "video"
    )
    assert asked(modality="audio,text") == kept(lambda r: r["modality"] in ("audio", "text"))


def test_what_is_printed(place, capsys):
    words = ["search", str(place.library), "a dog barks", "rain"]
    assert cli.main([*words, "k=3", "modality=video"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["score", "cosine", "what", "time", "(s)", "key", "caption"]
    assert all(re.search(r"video +0\.0 - 1\.0 +source_", line) for line in lines[1:])
    assert cli.main([*words, "k=3", "modality=video", "format=json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert [f"{h['score']:6.2f}" for h in hits] == [line[:6] for line in lines[1:]]
    assert (hits[0]["end_s"], hits[0]["folder"]) == (1.0, str(place.folder / "shards"))


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["  "], {}, "the query is empty"),
        (["clip.wav"], {}, r"clip.wav: no such file"),
        (["bad.mp4"], {}, "cannot be read as sound, video or picture"),
        (["a dog"], {"space": "xy"}, "space=xy: the index has av, avt"),
        (["a dog"], {"space": "av"}, r"text cannot be compared with .* av \(audio video\)"),
        (["a dog"], {"modality": "smell"}, "the index holds audio, video, text"),
        (["a dog"], {"where": "colour = 3"}, "No field named colour.*the columns are id, space"),
        (["a dog"], {"where": "key = = 3"}, "parser error"),
        (["a dog"], {"where": "key > 3"}, "could not convert.*single quotes"),
    ],
)
def test_wrong_questions(place, found, monkeypatch, words, options, message):
    monkeypatch.chdir(place.folder)
    Path("bad.mp4").write_bytes(b"not a film")
    with pytest.raises(UserError, match=message):
        found(*words, **options)


def test_the_wrong_index_or_model(place, tmp_path):
    with pytest.raises(UserError, match="no index; make one with mmssl index build"):
        search.main(str(tmp_path), ["a dog"])
    run_folder(tmp_path / "other", "avt/mmv_fac")
    with pytest.raises(UserError, match=r"other: its model has the hash .* holds vectors of"):
        search.main(str(place.library), ["a dog"], [f"model={tmp_path}/other"])
    with pytest.raises(UserError, match="no such run; say where the index's model is"):
        search.main(str(place.library), ["a dog"], [f"model={tmp_path}/none"])


def test_the_extra_is_named_where_it_is_missing(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(UserError, match=r"pip install 'mmssl\[index\]'"):
        Index.open(place.library)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'mmssl\[index\]'"):
        build.main("build", str(place.folder / "shards"), ["model=run", f"out={tmp_path}"])


def test_the_commands_of_the_readme(place, tmp_path, monkeypatch, capsys):
    """As they stand there, with the tiny run and shards under their names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("### Search\n")[2].partition("\n### ")[0]
    lines = [x for x in section.splitlines() if re.match(r"(launch/\S+ \d+|mmssl) \w+", x)]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert [c[1] for c in commands if c[0] == "mmssl"][:2] == ["index", "search"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place.folder / "run", "runs/quickstart")
    for part in ("train", "test"):
        shutil.copytree(place.folder / "shards", f"runs/quickstart/shards/{part}")
    Path("rain.wav").write_bytes(write_media(None, tone(1.0, 16000), fps=10))
    Image.fromarray(moving_frames(1)[0]).save("frame.png")
    for command in commands:
        words = command[1:] if command[0] == "mmssl" else command[2:]
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
    assert table_name("avt", "video") in capsys.readouterr().out
