"""Manifests in every format and place, media of several files, and what is said in a clip."""

import csv
import io
import json
from dataclasses import replace
from datetime import datetime

import fsspec
import numpy as np
import pyarrow
import pytest
from media_files import click_wave, flash_frames, tone, write_media
from PIL import Image
from pyarrow import parquet

from data_tools.manifest import as_tree, find_manifests, read_rows, stamps
from data_tools.manifest.media import Joined, Remote
from data_tools.shard_rows import Options, prepare
from mmssl.data.decode import ClipReader
from mmssl.data.samples import read
from mmssl.types import Sample, Transcript, UserError, Word
from mmssl.views.plan import Need

SAID = {
    "text": "Hello, old world!",
    "words": [[0.1, 0.4, "Hello,"], [0.5, 0.9, "old"], [1.0, 1.5, "world!"]],
}
ROWS = [
    {
        "media": "a.mp4",
        "captions": ["one", "two"],
        "source": "s",
        "split": "train",
        "start": 0.5,
        "end": 2.0,
        "has": ["audio", "text"],
        "meta": {"label": "x", "fold": 3},
        "transcript": SAID,
        "language": "en",
    },
    {"media": "b.mp4", "caption": "three", "source": "t", "split": "val"},
]


def rows_of(place):
    return list(read_rows(place))


def write_table(path, delimiter):
    cells = [dict(row) for row in ROWS]
    for row in cells:
        row.update({k: json.dumps(row[k]) for k in ("captions", "transcript") if k in row})
        row.update({f"meta.{k}": v for k, v in row.pop("meta", {}).items()})
        row.update({"has": " ".join(row["has"])} if "has" in row else {})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(cells[0] | cells[1]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(cells)


def write_parquet(path, rows=ROWS):
    flat = [dict(row) for row in rows]
    for row in flat:
        names = ("start", "end", "word")
        if "transcript" in row:
            words = [dict(zip(names, word, strict=True)) for word in row["transcript"]["words"]]
            row["transcript"] = {"text": row["transcript"]["text"], "words": words}
        row["meta.fold"] = row.get("meta", {}).get("fold")
        row["meta"] = {"label": row.get("meta", {}).get("label")}
    parquet.write_table(pyarrow.Table.from_pylist(flat, pyarrow.schema(_schema(flat))), path)


def _schema(rows):
    names = dict.fromkeys(name for row in rows for name in row)
    return [(name, pyarrow.array([row.get(name) for row in rows]).type) for name in names]


def write_lines(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".tsv", lambda path: write_table(path, "\t")),
        (".csv", lambda path: write_table(path, ",")),
        (".parquet", write_parquet),
    ],
)
def test_all_formats_have_the_same_rows(tmp_path, suffix, write):
    write_lines(tmp_path / "m.jsonl")
    write(tmp_path / f"m{suffix}")
    expected, found = rows_of(tmp_path / "m.jsonl"), rows_of(tmp_path / f"m{suffix}")
    words = tuple(Word(*word) for word in SAID["words"])
    assert expected[0].transcript == Transcript(SAID["text"], words)
    assert expected[0].media == tmp_path / "a.mp4"
    for one, other in zip(expected, found, strict=True):
        told = {str(k): str(v) for k, v in other.meta.items()}
        assert told == {k: str(v) for k, v in one.meta.items()}
        for name in one.__slots__:
            if name not in ("where", "meta"):
                assert getattr(one, name) == getattr(other, name), name


def test_parquet_files_of_a_folder_are_one_manifest(tmp_path):
    write_parquet(tmp_path / "part-0.parquet")
    write_parquet(tmp_path / "part-1.parquet")
    assert find_manifests(tmp_path) == [tmp_path]
    rows = rows_of(tmp_path)
    assert [row.index for row in rows] == [0, 1, 2, 3]
    assert rows[3].where == f"{tmp_path}/part-1.parquet:2"
    assert rows[3].media == tmp_path / "b.mp4"
    write_lines(tmp_path / "more.jsonl")
    with pytest.raises(UserError, match="holds Parquet and other manifests; name the ones"):
        find_manifests(tmp_path)


def test_meta_that_json_cannot_hold_loses_its_row(tmp_path):
    columns = {"caption": ["x"], "meta.when": [datetime(2026, 1, 1)]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "m.parquet")
    assert prepare(rows_of(tmp_path / "m.parquet")[0], Options()).reason == "meta"


def test_a_cell_may_be_long(tmp_path):
    (tmp_path / "m.csv").write_text(f"caption\n{'x' * 200_000}\n")
    assert len(rows_of(tmp_path / "m.csv")[0].captions[0]) == 200_000


def test_bad_parquet(tmp_path, monkeypatch):
    path = tmp_path / "m.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"m\.parquet: unreadable Parquet behind row 0"):
        rows_of(path)
    parquet.write_table(pyarrow.table({"media": ["a.mp4", "b.mp4"], "start": [0.0, -1.0]}), path)
    with pytest.raises(UserError, match=r"m\.parquet:2: start: expected seconds"):
        rows_of(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'mmssl\[parquet\]'"):
        rows_of(path)


def test_a_long_manifest_is_read_row_by_row(tmp_path):
    """The rows before a wrong line come out before it is seen."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"caption": "a"}\n{"caption": "b"}\nwrong\n')
    rows = read_rows(path)
    assert [next(rows).captions for _ in range(2)] == [("a",), ("b",)]
    with pytest.raises(UserError, match=r"m\.jsonl:3"):
        next(rows)


# --- object storage


@pytest.fixture
def bucket():
    """A storage in memory, with a folder of clips and a manifest of one of them."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    wave = write_media(None, tone(0.3, 8000), container="wav", rate=8000, audio_codec="pcm_s16le")
    for name in ("set/b.wav", "set/in/a.wav", "lists/c.wav"):
        files.pipe(f"/{name}", wave)
    files.pipe("/set/b.txt", b"a tone\nanother text\n")
    files.pipe("/lists/m.jsonl", b'{"media": "c.wav"}\n{"media": "memory://set/b.wav"}\n')
    yield files
    files.store.clear()


def test_a_prefix_is_read_as_a_folder(bucket):
    (place,) = find_manifests("memory://set/")
    rows = rows_of(place)
    assert [str(row.media) for row in rows] == ["memory://set/b.wav", "memory://set/in/a.wav"]
    assert [row.source for row in rows] == ["b", "in/a"]
    assert [row.captions for row in rows] == [("a tone", "another text"), ()]
    assert [dict(made.members).keys() for made in (prepare(r, Options()) for r in rows)] == [
        {"wav", "txt", "json"},
        {"wav", "json"},
    ]


def test_a_manifest_at_an_address(bucket, tmp_path):
    (place,) = find_manifests("memory://lists")
    assert place == "memory://lists/m.jsonl"
    rows = rows_of(place)
    assert [str(row.media) for row in rows] == ["memory://lists/c.wav", "memory://set/b.wav"]
    assert [row.where for row in rows] == [f"{place}:1", f"{place}:2"]
    write_lines(tmp_path / "m.jsonl", [{"media": "memory://lists/c.wav"}])
    (row,) = rows_of(tmp_path / "m.jsonl")
    assert prepare(row, Options()).reason == ""
    with pytest.raises(UserError, match=r"lists/x\.csv: no such file"):
        rows_of("memory://lists/x.csv")


def test_requests_that_fail_are_repeated(bucket, monkeypatch):
    calls = []
    known = type(bucket).cat_file

    def failing(self, path, *args, **options):
        calls.append(path)
        if len(calls) < 3:
            raise OSError("503 slow down")
        return known(self, path, *args, **options)

    monkeypatch.setattr(type(bucket), "cat_file", failing)
    assert Remote("memory://set/b.wav").read_bytes()[:4] == b"RIFF"
    assert len(calls) == 3
    calls.clear()
    assert rows_of("memory://set")[0].captions == ("a tone", "another text")
    assert calls == ["/set/b.txt"] * 3


def test_a_missing_object_is_one_lost_row(bucket, tmp_path):
    write_lines(tmp_path / "m.jsonl", [{"media": "memory://set/none.wav"}])
    made = prepare(rows_of(tmp_path / "m.jsonl")[0], Options())
    assert (made.reason, "memory://set/none.wav" in made.message) == ("file", True)


# --- several files


def picture(value, size=(64, 48)):
    sink = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(sink, "JPEG", quality=95)
    return sink.getvalue()


def wav(seconds, clicks_s=()):
    wave = click_wave(seconds, 16000, clicks_s)
    return write_media(None, wave, container="wav", rate=16000, audio_codec="pcm_s16le")


def decoded(row, need):
    made = prepare(row, Options())
    assert made.reason == "", made.message
    with ClipReader(read(Sample(made.key, (), dict(made.members)))) as reader:
        return reader.duration_s, reader.clip(need)


def test_pictures_are_shown_for_equal_parts_of_the_sound(tmp_path):
    for k in range(4):
        (tmp_path / f"{k}.jpg").write_bytes(picture(60 * k))
    (tmp_path / "a.wav").write_bytes(wav(2.0, [1.5]))
    write_lines(
        tmp_path / "m.jsonl",
        [
            {"media": [f"{k}.jpg" for k in range(4)], "sound": "a.wav"},
            {"media": "3.jpg", "sound": "a.wav"},
        ],
    )
    several, one = rows_of(tmp_path / "m.jsonl")
    seconds, clip = decoded(several, Need(16000, 0.0, 2.0, (0.0, 0.5, 1.0, 1.5)))
    assert seconds == pytest.approx(2.0, abs=0.002)
    assert clip.frame_times_s.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert clip.frames.float().mean((1, 2, 3)).tolist() == pytest.approx([0, 60, 120, 180], abs=2)
    assert np.flatnonzero(clip.waveform[0].abs() > 0.2)[0] / 16000 == pytest.approx(1.5, abs=0.005)
    seconds, clip = decoded(one, Need(16000, 0.0, 2.0, (0.0,)))
    assert (seconds, len(clip.frames)) == (pytest.approx(2.0, abs=0.002), 1)


@pytest.mark.parametrize("sound", ["a.wav", "a.m4a"])
def test_a_silent_video_and_its_sound_stay_in_time(tmp_path, sound):
    (tmp_path / "a.mp4").write_bytes(write_media(flash_frames(30, 10, [1.2])))
    (tmp_path / "a.wav").write_bytes(wav(3.0, [1.2]))
    (tmp_path / "a.m4a").write_bytes(write_media(None, click_wave(3.0, 16000, [1.2])))
    write_lines(tmp_path / "m.jsonl", [{"media": "a.mp4", "sound": sound}])
    row = rows_of(tmp_path / "m.jsonl")[0]
    assert row.media == Joined((tmp_path / "a.mp4",), tmp_path / sound)
    assert row.media.read_bytes() == row.media.read_bytes()
    seconds, clip = decoded(row, Need(16000, 0.0, 3.0, tuple(k / 10 for k in range(30))))
    assert seconds == pytest.approx(3.0, abs=0.1)
    bright = clip.frame_times_s[clip.frames.float().mean((1, 2, 3)) > 128]
    assert bright.tolist() == pytest.approx([1.2], abs=0.002)
    heard = np.flatnonzero(clip.waveform[0].abs() > 0.2)[0] / 16000
    assert heard == pytest.approx(1.2, abs=0.005)


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    (tmp_path / "0.jpg").write_bytes(picture(0))
    (tmp_path / "1.jpg").write_bytes(picture(0, (32, 32)))
    (tmp_path / "a.wav").write_bytes(wav(1.0))
    (tmp_path / "mute.mp4").write_bytes(write_media(flash_frames(5, 10, [])))
    write_lines(
        tmp_path / "m.jsonl",
        [
            {"media": ["0.jpg", "1.jpg"], "sound": "a.wav"},
            {"media": "0.jpg", "sound": "mute.mp4"},
            {"media": "a.wav", "sound": "a.wav"},
            {"media": "0.jpg", "sound": "none.wav"},
        ],
    )
    made = [prepare(row, Options()) for row in rows_of(tmp_path / "m.jsonl")]
    assert [m.reason for m in made] == ["header", "missing", "missing", "file"]
    assert "of another size" in made[0].message


def test_rows_are_written_as_they_are_read(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"12345")
    rows = [
        *ROWS,
        {"media": "s3://bucket/x.mp4"},
        {"media": str(tmp_path.parent / "x.mp4"), "licence": "CC0"},
        {"media": ["0.jpg", "s3://bucket/1.jpg"], "sound": "a.wav"},
        {"media": "a.mp4", "sound": "none.wav", "start": 1.0},
        {"transcript": {"text": "no times"}},
    ]
    write_lines(tmp_path / "m.jsonl", rows)
    found = rows_of(tmp_path / "m.jsonl")
    (tmp_path / "in").mkdir()
    for folder in (tmp_path, tmp_path / "in"):
        trees = [as_tree(row, folder) for row in found]
        write_lines(folder / "n.jsonl", trees)
        again = rows_of(folder / "n.jsonl")
        assert [replace(row, where="") for row in again] == [replace(r, where="") for r in found]
    assert as_tree(found[5], tmp_path) == {"media": "a.mp4", "sound": "none.wav"} | {
        "source": "a",
        "start": 1.0,
    }
    status = (tmp_path / "a.wav").stat()
    assert stamps(found[4].media) == [None, (5, status.st_mtime_ns)]
    assert stamps(found[2].media) == stamps(found[6].media) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"media": "a.jpg"}, "pictures need a `sound`"),
        ({"caption": "x", "sound": "a.wav"}, "`sound` needs pictures"),
        ({"media": ["a.jpg", "b.mp4"], "sound": "a.wav"}, "a list must name"),
        ({"media": ["a.jpg", 3]}, "expected a path or a list of pictures"),
        ({"caption": "x", "transcript": "words"}, r"transcript: expected \{\"text\""),
        ({"caption": "x", "transcript": {"wrods": []}}, r"transcript: expected \{\"text\""),
        ({"transcript": {"words": [[0, 1]]}}, r"expected \[start, end, word\], got \[0, 1\]"),
        ({"transcript": {"words": [[2, 1, "x"]]}}, "'x' ends before it starts"),
        ({"transcript": {"words": [[-1, 1, "x"]]}}, "transcript: expected seconds from 0 on"),
        ({"transcript": {"text": " "}}, "needs `media` or a `caption`"),
    ],
)
def test_wrong_rows_are_named(tmp_path, row, message):
    write_lines(tmp_path / "m.jsonl", [row])
    with pytest.raises(UserError, match=message) as told:
        rows_of(tmp_path / "m.jsonl")
    assert "m.jsonl:1: " in str(told.value)


# --- transcripts in shards


def stored(tmp_path, **row):
    (tmp_path / "a.wav").write_bytes(wav(2.0))
    write_lines(tmp_path / "m.jsonl", [{"media": "a.wav", **row}])
    made = prepare(rows_of(tmp_path / "m.jsonl")[0], Options())
    return read(Sample(made.key, (), dict(made.members)))


def test_a_whole_file_keeps_its_transcript(tmp_path):
    record = stored(tmp_path, transcript=SAID)
    assert record.transcript == Transcript(SAID["text"], tuple(Word(*w) for w in SAID["words"]))
    assert (record.has, record.captions) == ({"audio", "text"}, ())
    assert record.texts == [SAID["text"]]


def test_a_part_has_the_words_inside_it_on_its_own_clock(tmp_path):
    """[0.7, 1.4] holds the middle of `world!`, and not the one of `old`, which lies on its edge."""
    said = {"words": [*SAID["words"], [1.39, 1.9, "again"]]}
    record = stored(tmp_path, transcript=said, start=0.71, end=1.4)
    (word,) = record.transcript.words
    assert word == Word(pytest.approx(0.29), pytest.approx(0.69), "world!")
    assert record.transcript.text == "world!"
    assert stored(tmp_path, transcript=SAID, start=1.6, end=2.0).transcript is None


def test_neighbouring_parts_share_no_word(tmp_path):
    words = [[0.1 * k, 0.1 * k + 0.1, f"w{k}"] for k in range(19)]
    parts = [(0.0, 0.47), (0.47, 1.23), (1.23, 2.0)]
    texts = [
        stored(tmp_path, transcript={"words": words}, start=s, end=e).transcript.text.split()
        for s, e in parts
    ]
    assert [word for text in texts for word in text] == [f"w{k}" for k in range(19)]


def test_a_transcript_without_times_is_said_throughout(tmp_path):
    record = stored(tmp_path, transcript={"text": "all of it"})
    assert record.transcript == Transcript("all of it", (Word(0.0, 2.0, "all of it"),))


def test_has_decides_on_the_transcript(tmp_path):
    assert stored(tmp_path, transcript=SAID, has=["audio"]).transcript is None
