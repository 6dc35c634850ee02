"""Reading a sample's json."""

import pytest

from mmssl.data import samples
from mmssl.data.integrity import DamagedSampleError, seal
from mmssl.types import Sample

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


@pytest.mark.parametrize("change", [{"index": "x"}, {"has": 3}, {"captions": None}, {"meta": [1]}])
def test_wrong_types_are_damage(change):
    with pytest.raises(DamagedSampleError):
        samples.read(sample({**RECORD, **change}))
