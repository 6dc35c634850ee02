"""Reading a sample's json."""

import pytest

from mmssl.data import samples
from mmssl.data.integrity import DamagedSampleError, seal
from mmssl.types import Sample, Transcript, Word

RECORD = {
    "key": "k",
    "source": "s",
    "index": 7,
    "has": ["audio", "text"],
    "captions": ["x"],
    "meta": {"a": 1},
}


def sample(record, **members):
    return Sample("k", (), {**members, "json": seal(record, members)})


def test_fields_and_media():
    record = samples.read(sample(RECORD, mp4=b"v", flac=b"a", txt=b"x"))
    assert (record.index, record.source, record.captions, record.meta) == (7, "s", ("x",), {"a": 1})
    assert record.has == {"audio", "text"}
    assert (record.video, record.sound) == (b"v", b"a")
    assert samples.read(sample(RECORD)).video is None


@pytest.mark.parametrize("name", ["source", "index", "has", "captions", "meta"])
def test_absent_fields_are_damage(name):
    broken = {k: v for k, v in RECORD.items() if k != name}
    with pytest.raises(DamagedSampleError, match=name) as caught:
        samples.read(sample(broken))
    assert caught.value.reason == "json"


def test_texts_are_the_captions_or_what_is_said():
    said = {"text": "Hi.", "words": [[0, 0.5, "hi"]]}
    both = samples.read(sample({**RECORD, "transcript": said}))
    assert both.transcript == Transcript("Hi.", (Word(0.0, 0.5, "hi"),))
    assert both.texts == ["x"]
    assert samples.read(sample({**RECORD, "captions": [], "transcript": said})).texts == ["Hi."]
    old = samples.read(sample(RECORD))
    assert (old.transcript, old.texts) == (None, ["x"])


@pytest.mark.parametrize(
    "change",
    [
        {"index": "x"},
        {"has": 3},
        {"captions": None},
        {"meta": [1]},
        {"transcript": "x"},
        {"transcript": {"text": "x"}},
        {"transcript": {"text": "x", "words": [[0, 1]]}},
    ],
)
def test_wrong_types_are_damage(change):
    with pytest.raises(DamagedSampleError):
        samples.read(sample({**RECORD, **change}))
