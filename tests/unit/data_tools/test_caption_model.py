"""Pipelines of tiny local models answer as the models do, with times of the file."""

import json
import re
import sys

import av
import fsspec
import numpy as np
import pytest
import torch
import transformers
from media_files import moving_frames, write_media
from tiny_speech import LETTERS, write_blip, write_ctc, write_whisper

from data_tools import transcribe as tool
from data_tools.caption_model import answer, load
from data_tools.caption_program import check_answer

SPEECH, PICTURES = tool.TASKS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, and five seconds of noise that changes ten times a second."""
    root = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    loud = np.repeat(rng.uniform(0, 1, 50), 1600)
    wave = (0.3 * rng.standard_normal(80_000) * loud).astype("f4")
    options = {"rate": 16_000, "audio_codec": "pcm_s16le"}
    (root / "sound.wav").write_bytes(write_media(wave=wave, container="wav", **options))
    (root / "part.wav").write_bytes(
        write_media(wave=wave[16_000:48_000], container="wav", **options)
    )
    (root / "film.mp4").write_bytes(write_media(moving_frames(20)))
    write_ctc(root / "ctc")
    write_whisper(root / "whisper")
    write_whisper(root / "phrases", alignment=False)
    write_blip(root / "blip")
    return root


def _asked(place, name, start=0.0, end=None):
    return {"id": 0, "media": str(place / name), "start": start, "end": end}


def _checked(model, request):
    line = json.dumps({"id": 0, **answer(model, request)}).encode()
    return check_answer(request, line)


def test_ctc_says_what_the_model_says(place):
    """The most probable letter of every 20 ms, repetitions merged; decoded here by hand."""
    model = transformers.Wav2Vec2ForCTC.from_pretrained(place / "ctc").eval()
    with av.open(str(place / "part.wav")) as file:
        parts = [frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)]
    wave = torch.from_numpy(np.concatenate(parts).astype("f4") / 32768)
    with torch.inference_mode():
        ids = model(wave[None]).logits[0].argmax(-1).tolist()
    merged = [i for k, i in enumerate(ids) if k == 0 or ids[k - 1] != i]
    names = ["", "<s>", "</s>", "<unk>", " ", *LETTERS[1:]]
    spelt = " ".join("".join(names[i] for i in merged).split())
    found = _checked(load(place / "ctc", SPEECH), _asked(place, "part.wav"))
    assert found["transcript"] == spelt
    assert len(spelt) > 20


def test_words_have_the_times_of_the_file(place):
    model = load(place / "ctc", SPEECH)
    alone = _checked(model, _asked(place, "part.wav"))
    inside = _checked(model, _asked(place, "sound.wav", 1.0, 3.0))
    assert inside["transcript"] == alone["transcript"]
    assert " ".join(word for _, _, word in alone["words"]) == alone["transcript"]
    assert len(alone["words"]) > 1
    for (first, last, word), (start, end, same) in zip(
        inside["words"], alone["words"], strict=True
    ):
        assert (first - 1, last - 1, word) == (pytest.approx(start), pytest.approx(end), same)
        assert 1.0 <= first < last <= 3.0


@pytest.mark.parametrize("name", ["whisper", "phrases"])
def test_whisper(place, name):
    """Also of more than its two seconds; of several languages it names the one it heard."""
    model = load(place / name, SPEECH)
    for start, end in ((1.0, 3.0), (0.0, None)):
        found = _checked(model, _asked(place, "sound.wav", start, end))
        assert found["words"]
        # random weights also say what trained ones never do: languages and times amid words
        said = ["".join(word for _, _, word in found["words"]), found["transcript"]]
        joined, whole = (re.sub(r"<\|.*?\|>| ", "", text) for text in said)
        assert joined == whole
        assert len(whole) > 10
        assert all(start <= s <= e <= (end or 5.0) for s, e, _ in found["words"])
        assert found.get("language", "en") in ("en", "de")


def test_a_picture_is_described(place):
    """The one in the middle; with a prompt as beginning."""
    model = load(place / "blip", PICTURES)
    captions = _checked(model, _asked(place, "film.mp4"))["captions"]
    assert captions == _checked(model, _asked(place, "film.mp4", 0.95, 1.05))["captions"]
    assert len(captions) == 1
    prompted = load(place / "blip", PICTURES, "a picture of")
    assert _checked(prompted, _asked(place, "film.mp4"))["captions"][0].startswith("a picture of")


def test_objects_and_sounds_of_their_own(place):
    """As the same file on disk, or in one."""
    speech, pictures = load(place / "ctc", SPEECH), load(place / "blip", PICTURES)
    heard = _checked(speech, _asked(place, "sound.wav", 0.5, 2.0))
    seen = _checked(pictures, _asked(place, "film.mp4"))
    apart = _asked(place, "film.mp4") | {"sound": str(place / "sound.wav")}
    assert _checked(speech, apart | {"start": 0.5, "end": 2.0}) == heard
    assert _checked(pictures, apart | {"start": 0.9, "end": 1.1}) == seen
    files = fsspec.filesystem("memory")
    files.pipe("/heard/sound.wav", (place / "sound.wav").read_bytes())
    address = {"id": 0, "media": "memory://heard/sound.wav", "start": 0.5, "end": 2.0}
    assert _checked(speech, address) == heard
    files.rm("/heard", recursive=True)
    assert "memory://heard/sound.wav" in answer(speech, address)["error"]


def test_what_a_clip_lacks_is_no_failure_but_what_is_broken_is(place):
    speech, pictures = load(place / "ctc", SPEECH), load(place / "blip", PICTURES)
    assert answer(speech, _asked(place, "film.mp4")) == {}
    assert answer(pictures, _asked(place, "sound.wav")) == {}
    assert "No such file" in answer(speech, _asked(place, "none.wav"))["error"]
    (place / "bad.wav").write_bytes(b"RIFF" + bytes(100))
    assert answer(speech, _asked(place, "bad.wav"))["error"]
    late = answer(speech, _asked(place, "sound.wav", 7.0, 8.0))
    assert late == {"error": "start lies after the end (5.000 s)"}


def test_command_line(place, tmp_path, capsys):
    rows = [{"media": "sound.wav"}, {"media": "film.mp4"}, {"media": "none.wav"}]
    manifest = place / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    assert tool.main([str(manifest), str(out), "--model", str(place / "ctc")]) == 1
    assert "3 rows, 3 with media\n  1 clips have no answer (1 refused)" in capsys.readouterr().out
    found = [json.loads(line) for line in out.read_text().splitlines()]
    model = load(place / "ctc", SPEECH)
    wanted = _checked(model, _asked(place, "sound.wav"))
    assert found[0]["transcript"] == {"text": wanted["transcript"], "words": wanted["words"]}
    assert [set(row) for row in found[1:]] == [{"media", "source"}] * 2


def test_transformers_is_an_extra(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "m.jsonl").write_text('{"media": "a.wav"}\n')
    words = [str(tmp_path / "m.jsonl"), str(tmp_path / "o.jsonl"), "--model", str(place / "ctc")]
    assert tool.main(words) == 2
    assert "pip install 'mmssl[hf]'" in capsys.readouterr().err
