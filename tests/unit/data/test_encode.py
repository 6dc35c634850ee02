"""One sample to one row, and when to stop because of bad ones."""

import itertools
import tarfile

import pytest
import torch
from media_files import moving_frames, tone, write_media

from mmssl.data.encode import BadSampleGuard, SampleEncoder
from mmssl.data.integrity import DamagedSampleError, Ledger, Quarantine, seal
from mmssl.specs import AugmentSpec, DataSpec, ViewSpec
from mmssl.types import Sample, UserError

VIEWS = {
    "wide": ViewSpec(modality="audio", crop_s=1.0, hz=16000),
    "low": ViewSpec(modality="audio", crop_s=0.5, hz=8000, window="other"),
    "big": ViewSpec(modality="video", crop_s=1.0, fps=10),
    "small": ViewSpec(modality="video", crop_s=0.5, fps=5, size=24),
    "words": ViewSpec(modality="text", length=6, candidates=2),
}


@pytest.fixture(scope="module")
def sample():
    members = {"mp4": write_media(moving_frames(20), tone(2.0, 16000, 500.0))}
    record = {
        "key": "s-1-0",
        "source": "s",
        "index": 4,
        "has": ["audio", "text", "video"],
        "captions": ["one thing", "another thing", "a third"],
        "meta": {"class": "x"},
    }
    return Sample(
        "s-1-0", ("Map", 3, ("Webdataset", 9)), {**members, "json": seal(record, members)}
    )


def encoder(tokenizer, views=VIEWS, training=True, seed=0, **data):
    return SampleEncoder(views, DataSpec(**data), seed, tokenizer, training)


def test_views_of_several_rates_and_sizes(sample, tokenizer):
    item = encoder(tokenizer)(sample)
    shapes = {name: [tuple(v.data.shape) for v in views] for name, views in item.views.items()}
    assert shapes["wide"] == [(16000,)]
    assert shapes["low"] == [(4000,)]
    assert shapes["big"] == [(10, 48, 64, 3)]
    assert shapes["small"] == [(3, 24, 24, 3)]
    assert len(item.views["words"]) == 2
    assert (item.key, item.source, item.index, item.meta) == ("s-1-0", "s", 4, {})
    # Both rates hear the same tone at the same level.
    for name in ("wide", "low"):
        data = item.views[name][0].data[800:-800]
        assert data.square().mean().sqrt() == pytest.approx(0.2 / 2**0.5, rel=0.05)


def test_randomness_comes_from_seed_key_and_visit(sample, tokenizer):
    def starts(run, restore_key=sample.restore_key, key=None, training=True):
        moved = Sample(sample.key, restore_key, sample.fields)
        item = encoder(tokenizer, training=training, seed=run)(moved)
        return [(v.start_s, v.seed) for v in itertools.chain(*item.views.values())]

    assert starts(0) == starts(0)
    assert starts(0) != starts(1)
    assert starts(0) != starts(0, ("Map", 4, ("Webdataset", 9)))
    fixed = starts(0, training=False)
    assert fixed == starts(0, ("other", 1), training=False)
    assert all(start == 0.0 for start, _ in fixed)


def test_evaluation_knows_the_stored_clip(sample, tokenizer):
    meta = encoder(tokenizer, training=False)(sample).meta
    assert meta["captions"] == ["one thing", "another thing", "a third"]
    assert (meta["class"], meta["source"], meta["stored_size"]) == ("x", "s", [64, 48])
    assert meta["duration_s"] == pytest.approx(2.0, abs=1e-3)


def test_limits_come_from_the_data_spec(sample, tokenizer):
    with pytest.raises(DamagedSampleError, match="exceed 3000 pixels"):
        encoder(tokenizer, max_pixels=3000)(sample)
    with pytest.raises(DamagedSampleError, match="limit of 1 s"):
        encoder(tokenizer, max_seconds=1.0)(sample)


def test_wrong_views_are_refused_at_once(tokenizer):
    bad = {"a": ViewSpec(modality="audio", augment=[AugmentSpec(kind="flip")])}
    with pytest.raises(UserError, match=r"views\.a\.augment\[0\]"):
        encoder(tokenizer, bad)
    with pytest.raises(UserError, match=r"needs `data\.tokenizer`"):
        encoder(None)


def test_decoders_give_equal_rows(sample, tokenizer):
    pytest.importorskip("decord")
    rows = [encoder(tokenizer, decoder=name)(sample) for name in ("pyav", "decord")]
    for name in ("big", "small"):
        assert torch.equal(rows[0].views[name][0].data, rows[1].views[name][0].data)


def test_guard_judges_the_last_thousand():
    guard = BadSampleGuard(0.01, Ledger(), Quarantine())
    for _ in range(10):
        guard.bad("k", "crc", "broken")
    assert not guard.stop
    for _ in range(995):
        guard.good()
    for _ in range(5):
        guard.bad("k", "decode", "broken")
    assert not guard.stop  # ten of the last thousand
    guard.bad("k", "decode", "the last straw")
    assert "11 of the last 1000 samples" not in guard.stop
    for _ in range(5):
        guard.bad("k", "decode", "the last straw")
    assert "11 of the last 1000 samples" in guard.stop
    assert "crc 10, decode 11" in guard.stop
    assert "the last straw" in guard.stop


def test_guard_with_no_tolerance():
    guard = BadSampleGuard(0.0, Ledger(), Quarantine())
    guard.good()
    assert not guard.stop
    guard.bad("k", "crc", "broken")
    assert "1 of the last 2 samples" in guard.stop


def test_shards_hold_no_python_objects(shards):
    names = set()
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            names |= {member.name.partition(".")[2] for member in tar}
    assert names == {"mp4", "m4a", "txt", "json"}


def test_guard_lists_what_is_deadly(tmp_path):
    guard = BadSampleGuard(0.5, Ledger(), Quarantine(tmp_path / "quarantine.jsonl"))
    for reason in ("crc", "timeout", "decode", "memory", "crash"):
        guard.bad(f"k-{reason}", reason, "why")
    assert guard.quarantine.keys == {"k-timeout", "k-memory", "k-crash"}
    again = BadSampleGuard(0.5, Ledger(), Quarantine(tmp_path / "quarantine.jsonl"))
    assert again.quarantine.keys == guard.quarantine.keys
