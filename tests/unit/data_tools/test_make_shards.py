"""Shards: bytes that do not depend on the number of cores, keys, cuts, quarantine, clear errors."""

import csv
import hashlib
import io
import json
import os
import tarfile
import weakref
from dataclasses import replace

import av
import numpy as np
import pytest
from media_files import click_wave, flash_frames, moving_frames, tone, write_corpus, write_media
from shard_builds import bytes_of

from data_tools import journal, shard_writer
from data_tools import make_shards as tool
from data_tools.check_shards import check_folder
from data_tools.make_shards import make_shards
from data_tools.manifest import files
from data_tools.shard_rows import sample_key
from data_tools.transcode import Encoding
from mmssl.data.decode import ClipReader
from mmssl.data.folders import DATASET_YAML
from mmssl.data.integrity import canonical, crc32c, valid_key
from mmssl.data.samples import read
from mmssl.types import Sample, UserError
from mmssl.views.plan import Need


def samples_of(folder):
    """Samples of a folder in order, by key."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                found.setdefault(key, {})[name] = tar.extractfile(member).read()
    return found


def records(folder):
    return [read(Sample(key, (), fields)) for key, fields in samples_of(folder).items()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 13, lacks=(None, None, "text", None, "audio", None, "video"))
    return folder


@pytest.fixture
def manifest(tmp_path):
    """Writes rows to a JSON-lines manifest beside two usable clips."""
    write_corpus(tmp_path, 2)

    def write(*rows):
        path = tmp_path / "m.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return path

    return write


def test_bytes_do_not_depend_on_the_workers(corpus, tmp_path):
    reencode = Encoding(short_side=16, gop=5, fps=5)
    for options in ({}, {"reencode": reencode}):
        outs = [tmp_path / f"{len(options)}-{workers}" for workers in (1, 3)]
        for out, workers in zip(outs, (1, 3), strict=True):
            make_shards(corpus, out, workers=workers, shard_samples=4, **options)
        assert bytes_of(outs[0]) == bytes_of(outs[1])
        assert len(list(outs[0].glob("*.tar"))) == 4


def test_profile_of_a_sample(corpus, tmp_path):
    make_shards(corpus, tmp_path / "out", shard_samples=5)
    found = samples_of(tmp_path / "out")
    assert len(found) == 13
    for k, (key, fields) in enumerate(found.items()):
        record = json.loads(fields["json"])
        assert valid_key(key)
        name = "m4a" if k % 7 == 6 else "mp4"
        media = (corpus / f"clip{k:03d}.{name}").read_bytes()
        assert key == f"source_{k // 2}-{hashlib.sha256(media).hexdigest()[:16]}-0"
        assert fields[name] == media
        assert set(fields) == {name, "json"} | (set() if k % 7 == 2 else {"txt"})
        assert (record["index"], record["key"], record["meta"]) == (k, key, {"number": k})
        assert record["crc32c"] == {n: crc32c(d) for n, d in fields.items() if n != "json"}
        own = record.pop("crc32c_self")
        assert own == crc32c(canonical(record))
        lacks = {2: "text", 4: "audio", 6: "video"}.get(k % 7)
        assert record["has"] == [m for m in ("audio", "text", "video") if m != lacks]
        assert record["captions"] == (
            [] if lacks == "text" else [f"clip number {k} shows a moving pattern"]
        )
        assert record["end"] == pytest.approx(1.0, abs=0.1)
        assert record["rate"] == (0 if lacks == "audio" else 16000)
        assert (record["width"], record["fps"]) == ((0, 0.0) if lacks == "video" else (32, 10.0))


def test_manifest_and_tar_headers(corpus, tmp_path):
    out = tmp_path / "out"
    make_shards(corpus, out, shard_samples=5)
    tree = json.loads((out / "manifest.json").read_text())
    assert [s["samples"] for s in tree["shards"]] == [5, 5, 3]
    assert tree["samples"] == 13
    for shard in tree["shards"]:
        data = (out / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    # Rows 6 and 13 have no video, row 4 and 11 no audio; AAC pads to whole blocks.
    assert sum(s["seconds"]["video"] for s in tree["shards"]) == pytest.approx(12.0, abs=0.1)
    assert sum(s["captions"] for s in tree["shards"]) == 11
    assert (out / ".nv-meta" / "dataset.yaml").read_text() == DATASET_YAML
    with tarfile.open(out / "shard-000000.tar") as tar:
        owners = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
    assert owners == {(0, 0, 0, "", "", 0o644)}


def test_size_limit(corpus, tmp_path):
    make_shards(corpus, tmp_path / "out", shard_mb=0.03)
    sizes = [p.stat().st_size for p in (tmp_path / "out").glob("*.tar")]
    assert len(sizes) > 3
    # The end-of-archive mark and the padding of the record come on top.
    assert max(sizes) <= 30_000 + 2 * tarfile.RECORDSIZE


def test_splits_become_folders(tmp_path):
    write_corpus(tmp_path / "media", 6, splits=("train", "train", "val"))
    reports = make_shards(tmp_path / "media", tmp_path / "out")
    assert [(r.folder.name, r.samples) for r in reports] == [("train", 4), ("val", 2)]
    assert [r.index for r in records(tmp_path / "out" / "val")] == [2, 5]
    assert (tmp_path / "out" / "val" / "val-000000.tar").exists()


def test_csv_manifest_equals_json_lines(corpus, tmp_path):
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    path = corpus / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["media", "caption", "source", "has", "meta.number"])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    "media": row["media"],
                    "caption": row["caption"],
                    "source": row["source"],
                    "has": " ".join(row["has"]),
                    "meta.number": row["meta"]["number"],
                }
            )
    make_shards(corpus / "manifest.jsonl", tmp_path / "a")
    make_shards(path, tmp_path / "b")
    path.unlink()
    a, b = records(tmp_path / "a"), records(tmp_path / "b")
    assert [(r.key, r.captions, r.has, r.source) for r in a] == [
        (r.key, r.captions, r.has, r.source) for r in b
    ]
    assert [r.meta for r in b] == [{"number": str(k)} for k in range(13)]


def test_folder_of_media_with_captions_beside(tmp_path):
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.mp4", "sub/a.mp4"):
        (folder / name).write_bytes(write_media(moving_frames(5, seed=len(name)), tone(0.5, 16000)))
    (folder / "sub" / "c.wav").write_bytes(
        write_media(None, tone(0.5, 8000), container="wav", rate=8000, audio_codec="pcm_s16le")
    )
    (folder / "b.txt").write_text("first caption\n\nsecond caption\n")
    (folder / "notes.md").write_text("ignored")
    make_shards(folder, tmp_path / "out")
    found = records(tmp_path / "out")
    assert [r.source for r in found] == ["b", "sub/a", "sub/c"]
    assert [r.captions for r in found] == [("first caption", "second caption"), (), ()]
    assert [sorted(r.has) for r in found] == [
        ["audio", "text", "video"],
        ["audio", "video"],
        ["audio"],
    ]
    assert found[1].key.startswith("sub_a-")
    assert found[2].sound is not None


def test_text_only_rows(manifest, tmp_path):
    make_shards(manifest({"caption": "only words", "source": "book"}), tmp_path / "out")
    (record,) = records(tmp_path / "out")
    assert (record.has, record.captions, record.video) == ({"text"}, ("only words",), None)


# --- cutting and re-encoding


def test_cut_keeps_the_clock(tmp_path):
    """A flash and a click inside the cut stay where they were, counted from the cut's start."""
    data = write_media(
        flash_frames(60, 10, [3.2, 4.5]),
        click_wave(6.0, 16000, [3.2 - 0.3, 4.5 - 0.3]),
        container="matroska",
        audio_at=0.3,
    )
    (tmp_path / "long.mkv").write_bytes(data)
    rows = tmp_path / "m.jsonl"
    rows.write_text(
        json.dumps({"media": "long.mkv", "start": 2.5, "end": 5.0, "has": ["audio", "video"]})
    )
    make_shards(rows, tmp_path / "out")
    ((key, fields),) = samples_of(tmp_path / "out").items()
    assert key.endswith("-2500")
    record = json.loads(fields["json"])
    assert (record["start"], record["end"]) == (2.5, 5.0)
    with ClipReader(read(Sample(key, (), fields))) as reader:
        assert reader.duration_s == pytest.approx(2.5, abs=0.01)
        clip = reader.clip(Need(16000, 0.0, 2.5, tuple(k / 10 for k in range(25))))
    bright = clip.frame_times_s[clip.frames.float().mean((1, 2, 3)) > 128]
    assert bright.tolist() == pytest.approx([0.7, 2.0], abs=0.01)
    loud = np.flatnonzero(clip.waveform[0].abs().numpy() > 0.2) / 16000
    assert loud.min() == pytest.approx(0.7, abs=0.005)
    assert loud.max() == pytest.approx(2.002, abs=0.005)


def test_reencoding(tmp_path):
    frames = np.repeat(moving_frames(40, 48, 96)[..., :1], 3, axis=-1)
    (tmp_path / "a.mp4").write_bytes(
        write_media(frames, tone(2.0, 16000), fps=20, options={"g": "250"})
    )
    encoding = Encoding(short_side=24, gop=4, fps=10)
    make_shards(tmp_path, tmp_path / "out", reencode=encoding)
    ((_, fields),) = samples_of(tmp_path / "out").items()
    with av.open(io.BytesIO(fields["mp4"])) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (48, 24, 10)
        packets = [p for p in container.demux(stream) if p.size]
    assert len(packets) == 20
    assert [k for k, p in enumerate(packets) if p.is_keyframe] == [0, 4, 8, 12, 16]
    with ClipReader(records(tmp_path / "out")[0]) as reader:
        clip = reader.clip(Need(16000, 0.0, 2.0, tuple(k / 10 for k in range(20))))
    small = frames.reshape(40, 24, 2, 48, 2, 3).mean((2, 4))
    distance = np.abs(clip.frames.numpy()[:, None] - small[None]).mean((2, 3, 4))
    assert distance.argmin(1).tolist() == list(range(0, 40, 2))
    assert distance.min(1).max() < 4
    assert clip.waveform[0, 4000:28000].square().mean().sqrt() == pytest.approx(
        0.2 / 2**0.5, rel=0.05
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size=3", "unknown 'size'"),
        ("gop=x", "gop: 'x' is no number"),
        ("gop=0", "out of range"),
        ("fps=-1", "out of range"),
    ],
)
def test_encoding_options(text, message):
    with pytest.raises(UserError, match=message):
        Encoding.parse(text)


def test_encoding_is_parsed():
    assert Encoding.parse("short_side=128,gop=20,fps=12.5") == Encoding(128, 20, 12.5)


def test_parts_that_begin_together_are_several_clips(manifest, tmp_path):
    """Up to other ends; the file's own end and one behind it are the same."""
    ends = (0.4, 0.7, None, 9.0)
    path = manifest(*({"media": "clip000.mp4", "start": 0.1, "end": end} for end in ends))
    (report,) = make_shards(path, tmp_path / "out")
    found = records(tmp_path / "out")
    assert [r.index for r in found] == [0, 1, 2]
    assert len({r.key for r in found}) == 3
    assert report.quarantined == 1


# --- bad rows and bad manifests


def test_bad_media_goes_to_quarantine(manifest, tmp_path):
    good = (tmp_path / "clip000.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.mp4").write_text("this is no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "old.avi").write_bytes(
        write_media(
            moving_frames(5), None, container="avi", video_codec="mjpeg", pix_fmt="yuvj420p"
        )
    )
    (tmp_path / "silent.mp4").write_bytes(write_media(moving_frames(5), None))
    path = manifest(
        {"media": "clip000.mp4"},
        {"media": "cut.mp4"},
        {"media": "text.mp4"},
        {"media": "empty.mp4"},
        {"media": "nowhere.mp4"},
        {"media": "clip000.mp4", "caption": "the same clip"},
        {"media": "silent.mp4", "has": ["audio", "video"]},
        {"media": "clip001.mp4", "start": 7},
        {"media": "old.avi"},
        {"media": "clip001.mp4"},
    )
    (report,) = make_shards(path, tmp_path / "out")
    assert (report.samples, report.quarantined) == (2, 8)
    assert [r.index for r in records(tmp_path / "out")] == [0, 9]
    lines = [
        json.loads(x) for x in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert [(x["index"], x["reason"]) for x in lines] == [
        (1, "header"),
        (2, "header"),
        (3, "header"),
        (4, "file"),
        (5, "duplicate"),
        (6, "missing"),
        (7, "cut"),
        (8, lines[-1]["reason"]),
    ]
    assert lines[-1]["reason"] in ("format", "header")
    assert "reencode" in lines[-1]["message"]
    assert lines[3]["where"] == f"{path}:5"
    assert check_folder(tmp_path / "out").damages == []


def test_damage_that_only_decoding_shows(manifest, tmp_path):
    """A file whose packets were zeroed opens and demultiplexes well."""
    with av.open(str(tmp_path / "clip000.mp4")) as container:
        spans = [(p.pos, p.size) for p in container.demux() if p.size]
    data = bytearray((tmp_path / "clip000.mp4").read_bytes())
    for start, size in spans:
        data[start : start + size] = bytes(size)
    (tmp_path / "zero.mp4").write_bytes(data)
    path = manifest({"media": "zero.mp4"}, {"media": "clip001.mp4"})
    (report,) = make_shards(path, tmp_path / "out")
    assert (report.samples, report.quarantined) == (1, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"media": "clip000.mp4", "captoin": "x"},
            r"m\.jsonl:2: unknown key 'captoin'; did you mean 'caption'",
        ),
        (
            {"media": "clip000.mp4", "colour": 1},
            "unknown key 'colour'; put other fields under `meta`",
        ),
        ({}, r"m\.jsonl:2: needs `media` or a `caption`"),
        ({"media": 3}, "media: expected text, got 3"),
        ({"media": "clip000.mp4", "start": -1}, "start: expected seconds from 0 on, got -1"),
        ({"media": "clip000.mp4", "end": "soon"}, "end: expected seconds"),
        ({"media": "clip000.mp4", "start": 2, "end": 1}, "end 1 must lie after start 2"),
        ({"media": "clip000.mp4", "has": ["smell"]}, "has: expected some of audio, video, text"),
        ({"media": "clip000.mp4", "meta": 3}, "meta: expected an object"),
        ({"media": "clip000.mp4", "captions": "x"}, "captions: expected a list of texts"),
        ({"media": "clip000.mp4", "caption": "x", "captions": ["y"]}, "not both"),
        ({"media": "clip000.mp4", "split": "Train/1"}, "split: 'Train/1' must consist of"),
        ("not json", r"m\.jsonl:2: not a JSON object"),
        ("[1]", r"m\.jsonl:2: expected one JSON object per line"),
        ({"media": "clip000.mp4", "split": "val"}, "some rows have a `split` and others not"),
    ],
)
def test_manifest_errors_name_file_line_and_key(manifest, tmp_path, row, message):
    path = manifest({"media": "clip001.mp4"}, row)
    with pytest.raises(UserError, match=message):
        make_shards(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("media,caption\nclip000.mp4,a,b\n", r":2: more cells than the header"),
        ("media,start\nclip000.mp4,x\n", r":2: start: expected seconds"),
        ("media,meta\nclip000.mp4,{\n", r":2: meta: not JSON"),
        ("media,who\nclip000.mp4,me\n", r":2: unknown key 'who'"),
        ("media\n", "the manifest is empty"),
    ],
)
def test_csv_errors(manifest, tmp_path, text, message):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        make_shards(path, tmp_path / "out")


def test_other_errors(manifest, tmp_path):
    path = manifest({"media": "clip000.mp4"})
    for wrong, message in (
        (tmp_path / "none.jsonl", "no such file or folder"),
        (tmp_path / "clip000.mp4", r"a manifest is a \.jsonl, \.csv, \.tsv or \.parquet file"),
    ):
        with pytest.raises(UserError, match=message):
            make_shards(wrong, tmp_path / "out")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no media files"):
        make_shards(tmp_path / "bare", tmp_path / "out")
    for options, message in (
        ({"shard_samples": 0}, "--shard-samples 0"),
        ({"shard_mb": 0}, "--shard-mb 0"),
        ({"workers": 0}, "--workers 0"),
    ):
        with pytest.raises(UserError, match=message):
            make_shards(path, tmp_path / "out", **options)
    with pytest.raises(UserError, match=r"none of the 1 rows is usable; the first: .*gone\.mp4"):
        make_shards(manifest({"media": "gone.mp4"}), tmp_path / "out")
    other = tmp_path / "other.jsonl"
    other.write_text(path.read_text())
    with pytest.raises(UserError, match="both fill the split"):
        make_shards([path, other], tmp_path / "out")
    (tmp_path / "latin.jsonl").write_bytes('{"caption": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        make_shards(tmp_path / "latin.jsonl", tmp_path / "out")
    with pytest.raises(UserError, match="more than 1 shards, for 1 hold 1 of 2 rows"):
        make_many(path, tmp_path)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))


def make_many(path, tmp_path):
    path.write_text('{"media": "clip000.mp4"}\n{"media": "clip001.mp4"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "MAX_SHARDS", 1)
        make_shards(path, tmp_path / "out", shard_samples=1)


# --- an output that exists


def test_existing_output(manifest, tmp_path):
    out = tmp_path / "out"
    one, two = {"media": "clip000.mp4"}, {"media": "clip001.mp4"}
    assert not make_shards(manifest(one), out)[0].unchanged
    before = bytes_of(out)
    assert make_shards(manifest(one), out)[0].unchanged
    with pytest.raises(UserError, match="holds other shards; pass --overwrite"):
        make_shards(manifest(one, two), out)
    assert bytes_of(out) == before
    make_shards(manifest(one, two), out, overwrite=True)
    assert len(records(out)) == 2
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that are no shards .notes\.txt"):
        make_shards(manifest(one), out, overwrite=True)
    assert len(records(out)) == 2
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.doc").write_text("mine")
    with pytest.raises(UserError, match="thesis"):
        make_shards(manifest(one), foreign)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_list_of_unchanged_shards_is_kept(manifest, tmp_path):
    """A further row that is bad changes no shard."""
    rows, out = [{"media": "clip000.mp4"}, {"media": "gone.mp4"}], tmp_path / "out"
    for count, listed in ((1, []), (2, [1]), (1, [])):
        (report,) = make_shards(manifest(*rows[:count]), out)
        assert report.quarantined == len(listed)
        path = out / "quarantine.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        assert [json.loads(x)["index"] for x in lines] == listed


def test_overwrite_replaces_damaged_shards(manifest, tmp_path):
    """Their list and sizes are those of the new ones."""
    out, path = tmp_path / "out", manifest({"media": "clip000.mp4"})
    make_shards(path, out)
    tar = out / "shard-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(bytes(len(whole)))
    (report,) = make_shards(path, out, overwrite=True)
    assert tar.read_bytes() == whole
    assert not report.unchanged


def test_rows_are_not_held(manifest, tmp_path, monkeypatch):
    """They are read anew while shards are made; then they must still be the same."""
    under_way, most = weakref.WeakSet(), 0

    def watched(place, read=journal.read_rows):
        nonlocal most
        for row in read(place):
            under_way.add(row.where)
            most = max(most, len(under_way))
            yield row

    class Text(str):
        __slots__ = ("__weakref__",)

        def __reduce__(self):
            return str, (str(self),)

    def parse(base, where, *rest, parse=files.parse):
        return replace(parse(base, where, *rest), where=Text(where))

    monkeypatch.setattr(files, "parse", parse)
    monkeypatch.setattr(tool, "read_rows", watched)
    monkeypatch.setattr(journal, "read_rows", watched)
    path = manifest(*({"caption": f"words {k}"} for k in range(300)))
    (report,) = make_shards(path, tmp_path / "out")
    assert (report.samples, 1 < most < 150) == (300, True)

    def changing(place):
        rows = list(journal_rows(place))
        yield from rows[:-1]
        yield replace(rows[-1], captions=("others",))

    journal_rows = files.read_rows
    monkeypatch.setattr(journal, "read_rows", changing)
    with pytest.raises(UserError, match=r"m\.jsonl: changed while shards were made of it"):
        make_shards(path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_names_that_are_not_utf8_can_be_listed(manifest, tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    (tmp_path / "clip000.mp4").rename(folder / "good.mp4")
    (folder / os.fsdecode(b"\xff.mp4")).write_bytes(b"no media")
    (report,) = make_shards(folder, tmp_path / "out")
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert (report.samples, json.loads(line)["reason"]) == (1, "header")
    assert json.loads(line)["media"].endswith(os.fsdecode(b"\xff.mp4"))


@pytest.mark.parametrize(
    ("source", "slug"),
    [
        ("Some Video (1).final", "some_video_1_final"),
        ("ÄÖ", "clip"),
        ("../../etc/passwd", "etc_passwd"),
        ("x" * 300, "x" * 40),
    ],
)
def test_keys_are_sanitised(source, slug):
    key = sample_key(source, "0123456789abcdef" * 4, 1.2345)
    assert key == f"{slug}-0123456789abcdef-1234"
    assert valid_key(key)


# --- command lines


def test_command_line(manifest, tmp_path, capsys):
    path = manifest({"media": "clip000.mp4"}, {"media": "gone.mp4"})
    assert tool.main([str(path), str(tmp_path / "out"), "--workers", "1"]) == 0
    text = capsys.readouterr()
    assert "1 samples in 1 shards" in text.out
    assert "1 rows left out" in text.out
    assert text.err == ""  # no progress bar where there is no terminal
    assert tool.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
