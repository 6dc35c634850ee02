"""mmssl index build on what has changed: rows are added, replaced, removed, never doubled."""

import json
import shutil

import numpy as np
import pytest
from index_runs import png, rows_of

from data_tools.make_shards import make_shards
from mmssl.index import build, store, vectors
from mmssl.types import UserError


def test_nothing_new_leaves_every_file_alone(place, capsys):
    state = {p: p.stat().st_mtime_ns for p in place.library.rglob("*") if p.name != ".lock"}
    words = [f"model={place.folder}/run", f"out={place.library}"]
    build.main("build", str(place.folder / "shards"), words)
    assert "0 new rows" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in place.library.rglob("*") if p.name != ".lock"}
    changed = {p for p in after if after[p] != state.get(p) and not p.is_dir()}
    assert not changed


def test_files_are_added_changed_and_never_doubled(place, made, tmp_path):
    media, out = tmp_path / "media", tmp_path / "library"
    media.mkdir()
    clips = [place.folder / "media" / f"clip{k:03d}.mp4" for k in (0, 4, 8)]
    shutil.copy(clips[0], media / "a.mp4")
    first = made(media, out)
    assert {r["key"] for r in first.values()} == {"a.mp4"}
    shutil.copy(clips[1], media / "b.mp4")
    shutil.copy(clips[0], media / "copy.mp4")  # the same content
    second = made(media, out)
    assert len(second) == 2 * len(first)
    assert {r["key"] for r in second.values()} == {"b.mp4", "copy.mp4"}
    assert first.keys() < second.keys()
    mean = np.load(out / store.MOMENTS)["av.audio/mean"]
    of = [r["vector"] for r in second.values() if (r["space"], r["modality"]) == ("av", "audio")]
    np.testing.assert_allclose(mean, np.mean(of, 0), atol=1e-7)
    shutil.copy(clips[2], media / "b.mp4")  # other content under the old name
    (media / "b.txt").write_text("the sea at night")
    third = made(media, out)
    old = {i for i, r in second.items() if r["key"] == "b.mp4"}
    assert not old & third.keys()
    assert {r["caption"] for r in third.values() if r["key"] == "b.mp4"} == {"the sea at night"}
    (media / "b.txt").unlink()
    fourth = made(media, out)
    assert all(r["modality"] != "text" for r in fourth.values())


@pytest.mark.parametrize("at_once", [True, False])
def test_what_others_share_outlives_a_change(place, made, tmp_path, at_once):
    """One row stands for equal contents until the last of them is gone."""
    media, out = tmp_path / "media", tmp_path / "library"
    media.mkdir()

    def texts():
        rows = made(media, out).values()
        assert len([r for r in rows if r["modality"] == "video"]) == 2  # one picture, two spaces
        return {(r["key"], r["caption"]) for r in rows if r["modality"] == "text"}

    for name, words in (("a", "a dog"), ("b", "a dog"), ("c", "a bird")):
        (media / f"{name}.png").write_bytes(png())
        (media / f"{name}.txt").write_text(words)
        found = {} if at_once else texts()
    found = found or texts()
    assert found == {("b.png", "a dog"), ("c.png", "a bird")}
    (media / "b.txt").write_text("a horse")
    assert texts() == {("a.png", "a dog"), ("b.png", "a horse"), ("c.png", "a bird")}
    (media / "a.txt").write_text("a horse")  # nobody has the dog any more
    assert {words for _, words in texts()} == {"a horse", "a bird"}


def test_keys_that_vanish_from_a_shard_are_deleted(place, made, tmp_path):
    lines = (place.folder / "media" / "manifest.jsonl").read_text().splitlines(keepends=True)
    some = place.folder / "media" / "some.jsonl"
    kept = []
    for first in (0, 1):
        some.write_text("".join(lines[first:3]))
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        make_shards(some, tmp_path / "shards", shard_samples=4, workers=1)
        rows = made(tmp_path / "shards", tmp_path / "library").values()
        kept.append(sorted({tuple(r["meta"]) for r in rows}))
    assert kept == [[(f"number={k}",) for k in range(first, 3)] for first in (0, 1)]


def test_vectors_that_were_made_again_replace_the_old(place, made, tmp_path):
    shutil.copytree(place.library / "vectors", tmp_path / "vectors")
    first = made(tmp_path / "vectors", tmp_path / "library", model="")
    path = sorted((tmp_path / "vectors").glob("*.parquet"))[0]
    table = vectors.parquet().read_table(path)
    facts = json.loads(table.schema.metadata[b"mmssl"])
    again = table.slice(1).replace_schema_metadata(
        {b"mmssl": json.dumps(facts | {"made": facts["made"] + 1})}
    )
    vectors.parquet().write_table(again, path)
    lost = table["id"][0].as_py()
    rows = made(tmp_path / "vectors", tmp_path / "library", model="")
    assert rows == {i: row for i, row in first.items() if i != lost}
    moments = np.load(tmp_path / "library" / store.MOMENTS)
    for key in {(r["space"], r["modality"]) for r in rows.values()}:
        of = [r["vector"] for r in rows.values() if (r["space"], r["modality"]) == key]
        np.testing.assert_allclose(moments[f"{'.'.join(key)}/mean"], np.mean(of, 0), atol=1e-7)


def test_vectors_of_other_settings_have_other_names(place, tmp_path):
    names = {}
    for space in ("av", "avt"):
        words = [f"model={place.folder}/run", f"out={tmp_path}/{space}", f"spaces={space}"]
        vectors.main(str(place.folder / "shards"), words)
        names[space] = {path.name for path in (tmp_path / space).glob("*.parquet")}
        build.main("build", f"{tmp_path}/{space}", [f"out={tmp_path}/library"])
        assert {r["space"] for r in rows_of(tmp_path / "library").values()} == {space}
    assert not names["av"] & names["avt"]


@pytest.mark.parametrize("word", ["model=run", "spaces=av", "window_s=0.5", "device=cpu"])
def test_what_made_vectors_cannot_heed_is_refused(place, tmp_path, word):
    key = word.partition("=")[0]
    with pytest.raises(UserError, match=f"{key} cannot be chosen for .*, whose vectors are made"):
        build.main("build", f"{place.library}/vectors", [f"out={tmp_path}/out", word])


def test_shards_and_files_share_an_index(place, made, tmp_path):
    shutil.copytree(place.library, tmp_path / "library")
    (tmp_path / "media").mkdir()
    shutil.copy(place.folder / "media" / "clip000.mp4", tmp_path / "media" / "again.mp4")
    (tmp_path / "media" / "still.png").write_bytes(png())
    before = rows_of(tmp_path / "library")
    rows = made(tmp_path / "media", tmp_path / "library")
    new = [r for i, r in rows.items() if i not in before]
    pictures = [r for r in new if r["key"] == "still.png"]
    assert {r["modality"] for r in pictures} == {"video"}
    assert len(pictures) == 2  # its spaces
