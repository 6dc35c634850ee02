"""The media of an index are read from where its rows say that they are."""

import shutil

import pytest
from media_files import moving_frames, tone, write_media

from mmssl.index.corpus import PLACE, open_corpus, record_of
from mmssl.index.store import Index
from mmssl.types import UserError

MAX = 2**27


def test_every_sample_of_a_shard(place):
    """With the bytes that were embedded; those of another sample are refused."""
    index = Index.open(place.library)
    rows = {r["key"]: r for key in index.keys for r in index.sample(key, PLACE, 100)}
    corpus = open_corpus(str(place.folder / "shards"), MAX)
    entries = {e.key: e for units in corpus.blocks() for e in corpus.entries(units)}
    assert rows.keys() == entries.keys()
    assert sum(map(corpus.count, corpus.blocks())) == len(entries)  # what progress goes towards
    for key, row in rows.items():
        record = record_of(row, MAX)
        assert (record.key, record.video or record.sound) == (
            key, entries[key].media.get("video") or entries[key].media.get("audio"),
        )  # fmt: skip
    first, second = list(rows.values())[:2]
    with pytest.raises(UserError, match="shards has changed; run mmssl index build with it again"):
        record_of(first | {"number": second["number"]}, MAX)
    with pytest.raises(UserError, match=r"cannot be read from .*shards"):
        record_of(first | {"number": 99}, MAX)


def test_shards_and_files_that_have_gone(place, tmp_path):
    shutil.copytree(place.folder / "shards", tmp_path / "shards")
    index = Index.open(place.library)
    (row,) = index.sample(("avt", "text"), PLACE, 1)
    moved = row | {"folder": str(tmp_path / "shards")}
    assert record_of(moved, MAX).key == row["key"]
    with pytest.raises(UserError, match="no such shard folder"):
        record_of(row | {"folder": str(tmp_path / "none")}, MAX)
    file = {"folder": str(tmp_path), "shard": "", "number": 0}
    with pytest.raises(UserError, match=r"a\.mp4: is not in .* any more"):
        record_of(file | {"key": "a.mp4"}, MAX)


def test_files_by_what_they_hold(tmp_path):
    film, sound = write_media(moving_frames(5), tone(0.5, 16000)), write_media(None, tone(1, 16000))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "film.mp4").write_bytes(film)
    (tmp_path / "sound.mp4").write_bytes(sound)
    (tmp_path / "text.mp4").write_bytes(b"no film")
    found = {
        key: record_of({"folder": str(tmp_path), "shard": "", "number": 0, "key": key}, MAX)
        for key in ("sub/film.mp4", "sound.mp4")
    }
    corpus = open_corpus(str(tmp_path), MAX)
    assert sum(map(corpus.count, corpus.blocks())) == 3
    assert found["sub/film.mp4"].has == {"audio", "video"}
    assert (found["sub/film.mp4"].video, found["sub/film.mp4"].sound) == (film, None)
    assert found["sound.mp4"].has == {"audio"}
    assert (found["sound.mp4"].video, found["sound.mp4"].sound) == (None, sound)
    with pytest.raises(UserError, match=r"text\.mp4: cannot be read"):
        record_of({"folder": str(tmp_path), "shard": "", "number": 0, "key": "text.mp4"}, MAX)


def test_rows_by_id_and_evenly(place):
    index = Index.open(place.library)
    rows = index.sample(("avt", "audio"), ["id", "key"], 100)
    assert len(rows) == 8
    assert index.sample(("avt", "audio"), ["id", "key"], 3) == [rows[0], rows[3], rows[7]]
    for row in rows:
        assert index.row(row["id"], ["id", "key"]) == row
    with pytest.raises(UserError, match='holds no row "it\'s"'):
        index.row("it's", ["key"])
