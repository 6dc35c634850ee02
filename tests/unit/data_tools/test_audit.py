"""A corpus with planted faults: every clip is counted, flagged and listed as what it is."""

import json
import os

import numpy as np
import pytest
from media_files import moving_frames, write_media
from test_audit_measure import blobs, noises

from data_tools import audit as tool
from data_tools.audit import audit
from data_tools.make_shards import make_shards
from data_tools.manifest import read_rows
from mmssl.data.integrity import Quarantine
from mmssl.types import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A manifest of clips named after what is wrong with them."""
    folder = tmp_path_factory.mktemp("corpus")
    good = [write_media(blobs(k, 20), noises(k)) for k in range(3)]
    files = {f"good{k}.mp4": data for k, data in enumerate(good)}
    files |= {
        "smaller.mp4": write_media(blobs(0, 20), noises(0), options={"crf": "28"}),
        "quieter.mp4": write_media(blobs(1, 20), 0.3 * noises(1)),
        "dubbed.mp4": write_media(blobs(2, 20), noises(9)),
        "still.mp4": write_media(np.repeat(blobs(4, 1), 20, 0), noises(4)),
        "silent.mp4": write_media(blobs(5, 20), np.zeros(32000, "f4")),
        "black.mp4": write_media(np.zeros((20, 48, 64, 3), np.uint8), noises(6)),
        "sound.wav": write_media(None, noises(7), container="wav", audio_codec="pcm_s16le"),
        "film.mp4": write_media(blobs(8, 20)),
        "cut.mp4": good[0][: len(good[0]) // 2],
        "text.mp4": b"this is no media file",
    }
    lines = []
    for number, (name, data) in enumerate(files.items()):
        (folder / name).write_bytes(data)
        line = {"media": name, "language": "de" if number % 2 else "en", "licence": "cc0"}
        lines.append(line | {"captions": ["a spot drifts", f"number {number}"]})
    lines.append({"media": "missing.mp4"})
    lines.append({"caption": "кошка спит", "source": "words"})
    lines.append({"media": "good2.mp4", "start": 0.5, "end": 1.0, "source": "part"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "rows.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit")
    return audit(str(corpus / "rows.jsonl"), out), out


def clips_of(out):
    return {c.get("source", c["number"]): c for c in map(json.loads, (out / "clips.jsonl").open())}


def test_flags(made):
    tree, out = made
    clips = clips_of(out)
    flagged = {name: c["flags"] for name, c in clips.items() if c["flags"]}
    assert flagged == {
        "smaller": ["duplicate"],
        "quieter": ["duplicate"],
        "still": ["still"],
        "silent": ["silent"],
        "black": ["still", "black"],
        "cut": ["damaged"],
        "text": ["damaged"],
        13: ["damaged"],
    }
    assert clips["smaller"]["duplicate_of"] == clips["good0"]["number"]
    assert clips["quieter"]["duplicate_of"] == clips["good1"]["number"]
    assert tree["clips"] == tree["of"] == 16
    assert tree["flags"]["duplicate"] == 2
    assert tree["duplicates"]["video"]["copies"] == 3  # with the one of another sound
    assert tree["damaged"] == {"header": 2, "file": 1}
    assert tree["dropped"] == {"flags": ["silent", "still", "black", "duplicate"], "n": 5}


def test_numbers_name_their_clips(made):
    tree, _ = made
    assert tree["presence"] == {
        "audio + text + video": 9,
        "audio + text": 1,
        "text + video": 1,
        "text": 1,
        "audio + video": 1,
    }
    assert tree["hours"]["video"] == pytest.approx((10 * 2 + 0.5) / 3600, rel=0.01)
    assert tree["numbers"]["loudness_lufs"]["n"] == 10  # silence has none
    assert tree["kinds"]["language"]["counts"] == {"en": 6, "de": 5}
    assert tree["kinds"]["licence"] == {"n": 11, "kinds": 1, "counts": {"cc0": 11}, "others": 0}
    found = tree["captions"]
    assert (found["n"], found["clips_without"]) == (23, 1)
    assert found["repeated_share"] == pytest.approx(10 / 23)
    assert found["words"] == 11 * 5 + 2
    assert found["scripts"] == {"latin": 22, "cyrillic": 1}
    histogram = tree["numbers"]["duration_s"]["histogram"]
    assert sum(histogram["counts"]) == tree["numbers"]["duration_s"]["n"] == 12


def test_lists_feed_training_and_make_shards(made, corpus, tmp_path):
    _, out = made
    clips = clips_of(out)
    listed = Quarantine(out / "quarantine.jsonl").keys
    dropped = ("smaller", "quieter", "still", "silent", "black")
    assert listed == {clips[name]["key"] for name in dropped}
    rows = list(read_rows(out / "kept.jsonl"))
    assert {row.source for row in rows} == {
        *("good0", "good1", "good2", "dubbed", "sound", "film", "words", "part"),
    }
    (report,) = make_shards(out / "kept.jsonl", tmp_path / "shards")
    assert (report.samples, report.quarantined) == (8, 0)
    # shards of all rows have the very keys that are listed
    make_shards(corpus / "rows.jsonl", tmp_path / "all")
    tree = audit(str(tmp_path / "all"), tmp_path / "audit")
    found = clips_of(tmp_path / "audit")
    assert {found[name]["key"] for name in dropped} == listed
    assert tree["flags"] == {
        **dict.fromkeys(("damaged", "clipped", "offset"), 0),
        **{"silent": 1, "still": 2, "black": 1, "duplicate": 2},
    }
    assert tree["kinds"]["licence"]["n"] == 11
    assert not (tmp_path / "audit" / "kept.jsonl").exists()


def test_page_is_whole_and_escaped(made):
    page = (made[1] / "audit.html").read_text()
    assert page.count("<section>") == page.count("</section>") >= 8
    assert "http" not in page
    assert page.count('src="data:image/jpeg') >= 16
    for title in ("Still:", "Duplicates", "The loudest", "integrated loudness", "a spot drifts"):
        assert title in page


def test_goes_on_after_a_kill(made, corpus, tmp_path, monkeypatch):
    _, out = made
    whole = (out / "measured.jsonl").read_bytes()
    (tmp_path / "measured.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    kept = whole[: len(whole) * 2 // 3].count(b"\n") - 1
    measured, plain = [], tool._clip
    monkeypatch.setattr(tool, "_clip", lambda *a: measured.append(a[2]) or plain(*a))
    audit(str(corpus / "rows.jsonl"), tmp_path)
    assert len(measured) == 16 - kept
    for name in ("clips.jsonl", "audit.json", "quarantine-audit.jsonl", "kept.jsonl"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name
    measured.clear()
    audit(str(corpus / "rows.jsonl"), tmp_path)
    assert measured == []


@pytest.mark.slow
def test_some_clips_then_more_in_several_processes(made, corpus, tmp_path):
    out = made[1]
    few = audit(str(corpus / "rows.jsonl"), tmp_path, clips=5)
    assert (few["clips"], few["of"]) == (5, 16)
    audit(str(corpus / "rows.jsonl"), tmp_path, workers=2)
    assert (tmp_path / "clips.jsonl").read_bytes() == (out / "clips.jsonl").read_bytes()


def test_a_decoder_that_dies_costs_one_clip(corpus, tmp_path, monkeypatch):
    def fragile(sample):
        if b"cut" in sample.key.encode():
            os._exit(3)
        return {"has": []}

    monkeypatch.setattr(tool, "measure", fragile)
    tree = audit(str(corpus / "rows.jsonl"), tmp_path)
    assert tree["damaged"] == {"crash": 1, "file": 1}


def test_errors(made, corpus, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"caption": "a"}\n')
    with pytest.raises(UserError, match="measurements of other data"):
        audit(str(tmp_path / "rows.jsonl"), made[1])
    with pytest.raises(UserError, match="no flag 'loud'"):
        audit(str(corpus / "rows.jsonl"), tmp_path, drop=["loud"])
    assert tool.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]) == 0
    assert "1 of 1 clips" in capsys.readouterr().out


def test_names_and_captions_that_utf8_cannot_hold(tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    name = os.fsdecode(b"caf\xe9")
    data = write_media(None, noises(0, 0.5), container="wav", audio_codec="pcm_s16le")
    (media / f"{name}.wav").write_bytes(data)
    (media / "<i>plain.wav").write_bytes(data)
    tree = audit(str(media), tmp_path / "out")
    assert (tree["clips"], tree["flags"]["duplicate"]) == (2, 1)
    (kept,) = read_rows(tmp_path / "out" / "kept.jsonl")
    assert kept.media.name == "<i>plain.wav"
    rows = [{"media": f"media/{name}.wav", "caption": "<b>half \ud800 of a pair"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    audit(str(tmp_path / "rows.jsonl"), tmp_path / "audit")
    (kept,) = read_rows(tmp_path / "audit" / "kept.jsonl")
    assert (kept.media.name, kept.captions) == (f"{name}.wav", ("<b>half \ufffd of a pair",))
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "&lt;b&gt;half \ufffd of a pair" in page
    assert "<b>half" not in page
    (report,) = make_shards(tmp_path / "audit" / "kept.jsonl", tmp_path / "shards")
    assert (report.samples, report.quarantined) == (1, 0)


def test_pipes_and_damaged_measurements(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    lines = [{"media": "pipe.mp4"}, {"caption": "a"}, {"caption": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    tree = audit(str(tmp_path / "rows.jsonl"), out)
    assert tree["damaged"] == {"file": 1}
    log = out / "measured.jsonl"
    whole = log.read_bytes()
    head, first, second, third = whole.splitlines(keepends=True)
    log.write_bytes(head + first + b"\0" * (len(second) - 1) + b"\n" + third)
    audit(str(tmp_path / "rows.jsonl"), out)
    assert log.read_bytes() == whole
    log.write_bytes(b"no log\n" + whole)
    with pytest.raises(UserError, match="choose another --out or remove the file"):
        audit(str(tmp_path / "rows.jsonl"), out)


def test_single_frame_and_text_only_page(tmp_path):
    (tmp_path / "one.mp4").write_bytes(write_media(moving_frames(1)))
    tree = audit(str(tmp_path), tmp_path / "out")
    assert tree["flags"]["still"] == 1
