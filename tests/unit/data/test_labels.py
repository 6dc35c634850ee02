"""Labels meet frames: HuBERT's rule, real loaders with random crops, and what `check` refuses."""

import json
import wave as wavefile
from dataclasses import replace as changed

import numpy as np
import pytest
import torch

from data_tools.make_shards import make_shards
from mmssl.data.collate import Item, collate, pack
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.labels import LabelBook, LabelKind, at_frames, check, crop, frame_ids, window
from mmssl.data.loader import train_loader
from mmssl.data.ordered import eval_batches
from mmssl.data.sidecars import LabelInfo, SideCar, Source, shards_digest, writing
from mmssl.specs import DataSpec, ViewSpec
from mmssl.types import FrameLabels, UserError, View

MFCC = Source("mfcc", 100.0, 0.0125)
HZ, FULL_S = 16000, 4.0  # the waves of the corpus rise by 1 in FULL_S seconds


def times(count, codebooks=1):
    """(N, G) ids that are their own time."""
    return np.repeat(np.arange(count)[:, None], codebooks, axis=1)


# ---------------------------------------------------------------- alignment


@pytest.mark.parametrize(
    ("samples", "mfcc", "frames"), [(16_000, 98, 49), (250_000, 1561, 781), (32_000, 198, 99)]
)
def test_mfcc_labels_serve_the_frames_of_the_convolutions(samples, mfcc, frames):
    """Kaldi's 25/10 ms windows and Conv7's 400/320 samples end together at a ratio of 2."""
    assert 1 + (samples - 400) // 160 == mfcc
    assert 1 + (samples - 400) // 320 == frames
    taken = crop(times(mfcc), 100.0, 0.0, frames, 50.0)
    assert taken[:, 0].tolist() == list(range(0, 2 * frames, 2))


def test_frames_behind_the_last_label_have_none():
    assert crop(times(5), 100.0, 0.0, 4, 50.0)[:, 0].tolist() == [0, 2, 4, -1]
    assert crop(times(5), 50.0, 0.04, 5, 50.0)[:, 0].tolist() == [2, 3, 4, -1, -1]
    assert crop(times(0), 50.0, 0.0, 2, 50.0)[:, 0].tolist() == [-1, -1]
    empty = torch.zeros(2, 0, 1, dtype=torch.int64)
    assert at_frames(empty, 50.0, 3, 50.0).tolist() == [[[-1]] * 3] * 2


@pytest.mark.parametrize("start", [0, 79, 80, 81, 160, 240, 3999, 12345, 47999])
@pytest.mark.parametrize("rate", [50.0, 100.0])
def test_crops_follow_huberts_rule(start, rate):
    """Labels from round(start * label_rate / 16000) on, frame t takes label floor(t * r)."""
    taken = crop(times(800), rate, start / HZ, 99, 50.0)[:, 0]
    expected = round(start * rate / HZ) + np.floor(np.arange(99) * rate / 50.0)
    assert taken.tolist() == expected.tolist()


@pytest.mark.parametrize("multiple", [1, 2, 3, 7])
@pytest.mark.parametrize("frame_hz", [16000 / 480, 48000 / 242, 6.25, 29.97])
def test_rates_that_are_no_round_numbers(multiple, frame_hz):
    taken = crop(times(3000), frame_hz * multiple, 0.0, 400, frame_hz)[:, 0]
    assert taken.tolist() == list(range(0, 400 * multiple, multiple))


def test_a_window_before_the_labels_has_none():
    assert window(times(3), 10.0, -0.2, 4)[:, 0].tolist() == [-1, -1, 0, 1]


# ---------------------------------------------------------------- a real loader


def write_ramps(folder, lengths_s, silent=()):
    """Lossless waves whose value tells the time, and shards of them; clips may lack audio."""
    folder.mkdir()
    lines = []
    for k, seconds in enumerate(lengths_s):
        values = np.arange(round(seconds * HZ)) / (FULL_S * HZ)
        with wavefile.open(str(folder / f"{k}.wav"), "wb") as out:
            out.setparams((1, 2, HZ, 0, "NONE", ""))
            out.writeframes(np.round(values * 32767).astype("<i2").tobytes())
        has = ["text"] if k in silent else ["audio", "text"]
        lines.append({"media": f"{k}.wav", "caption": f"clip {k}", "has": has})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_shards(folder, folder / "shards", shard_samples=4, workers=1)
    return folder / "shards"


LENGTHS_S = (2.0, 2.5, 3.0, 0.4, 1.0, 3.9, 2.2)
VIEWS = {
    "long": ViewSpec(modality="audio", crop_s=1.0),
    "short": ViewSpec(modality="audio", crop_s=0.3, window="other"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_ramps(tmp_path_factory.mktemp("ramps") / "train", LENGTHS_S, silent=(4,))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_ramps(tmp_path_factory.mktemp("ramps") / "val", (1.0, 2.0))


def lengths_of(shards):
    """Duration by key; 0 without audio."""
    views = {"a": ViewSpec(modality="audio")}
    out = {}
    for batch in eval_batches(shards, DataSpec(), views, 1, None, workers=0):
        view = batch.views["a"]
        out[batch.keys[0]] = 0.0 if view.dummy else view.data.shape[1] / HZ
    return out


def label(shards, path, source=MFCC, classes=(500,), early=0, skip=()):
    """A side-car whose ids are the times of the labels."""
    info = LabelInfo(source, classes, shards_digest(shards))
    with writing(path, info) as writer:
        for key, seconds in lengths_of(shards).items():
            count = max(0, round(seconds * source.rate_hz) - early)
            if key not in skip:
                writer.add(key, times(count, len(classes)), seconds)
    return path


@pytest.fixture(scope="module")
def car(shards):
    return label(shards, shards.parent / "mfcc.safetensors")


def batches(shards, paths, count, workers=0):
    data = DataSpec(train=str(shards), workers=workers, frame_labels=paths)
    loader = train_loader(data, VIEWS, 3, 0, 0, 1, None)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_random_crops_carry_the_labels_of_their_time(shards, car, workers):
    """The wave itself tells when each frame was; its label must be that of the same time."""
    seen, starts = 0, set()
    for batch in batches(shards, {"unit": str(car)}, 12, workers):
        for name in ("long", "short"):
            view = batch.views[name]
            frames = (view.data.shape[1] - 400) // 320 + 1
            units = frame_ids(view, "unit", frames, 50.0)[..., 0]
            assert units.shape == (len(view.data), frames)
            if view.dummy:
                assert units.eq(-1).all()
                continue
            begin = torch.arange(frames) * 320
            inside = begin[None] < view.lengths_P[:, None]
            clock = view.data[:, begin] * FULL_S * 32768 / 32767  # seconds
            off = units - clock * 100.0
            assert off[inside].abs().max() <= 0.5 + 0.01  # half a label, and PCM's rounding
            assert units[~inside].eq(-1).all()
            seen += int(inside.sum())
            starts |= set(view.start_s_P.tolist())
    assert seen > 1000
    assert len(starts) > 10


def test_labels_are_padded_like_their_views(shards, car):
    for batch in batches(shards, {"unit": str(car)}, 4):
        long, short = (batch.views[name].labels["unit"] for name in ("long", "short"))
        assert long.ids.shape == (len(batch.views["long"].data), 100, 1)
        assert short.ids.shape[1:] == (30, 1)
        assert (long.rate_hz, long.ids.dtype) == (100.0, torch.int64)
        counts = (long.ids[..., 0] >= 0).sum(1)
        expected = (batch.views["long"].lengths_P / HZ * 100).round().long()
        if not batch.views["long"].dummy:
            assert counts.tolist() == expected.tolist()


def test_labels_that_end_early_leave_frames_without(shards, tmp_path):
    path = label(shards, tmp_path / "l", early=5)
    views = {"a": ViewSpec(modality="audio")}
    data = DataSpec(frame_labels={"unit": str(path)})
    for batch in eval_batches(shards, data, views, 2, None, workers=0):
        view = batch.views["a"]
        if not view.dummy:
            counts = (view.labels["unit"].ids[..., 0] >= 0).sum(1)
            assert counts.tolist() == (view.lengths_P / HZ * 100).round().sub(5).tolist()


def test_several_names_and_codebooks(shards, car, tmp_path):
    slow = Source("run/audio", 50.0, 0.0125, 6)
    pair = label(shards, tmp_path / "pair", slow, (400, 300))
    for batch in batches(shards, {"unit": str(car), "deep": [str(pair)]}, 2):
        found = batch.views["long"].labels
        assert list(found) == ["unit", "deep"]
        assert found["deep"].ids.shape[1:] == (50, 2)
        assert found["deep"].rate_hz == 50.0
        assert torch.equal(found["deep"].ids[..., 0], found["deep"].ids[..., 1])


def test_evaluation_reads_the_labels_of_its_own_folder(shards, other, car):
    data = DataSpec(frame_labels={"unit": str(car)})
    views = {"a": ViewSpec(modality="audio")}
    (own,) = eval_batches(shards, data, views, 9, None, workers=0)
    (foreign,) = eval_batches(other, data, views, 9, None, workers=0)
    assert list(own.views["a"].labels) == ["unit"]
    view = foreign.views["a"]
    assert view.labels == {}
    with pytest.raises(UserError, match=r"no labels 'unit' \(there are none\)"):
        frame_ids(view, "unit", 10, 50.0)


def test_rows_choose_samples(shards):
    views = {"a": ViewSpec(modality="audio")}
    whole = [b.keys for b in eval_batches(shards, DataSpec(), views, 1, None, workers=0)]
    few = eval_batches(shards, DataSpec(), views, 2, None, workers=0, rows=[5, 0, 3])
    assert [b.keys for b in few] == [whole[5] + whole[0], whole[3]]


def test_labels_do_not_change_what_else_is_read(shards, car):
    plain = batches(shards, {}, 3)
    labelled = batches(shards, {"unit": str(car)}, 3)
    for a, b in zip(plain, labelled, strict=True):
        assert a.keys == b.keys
        assert a.views["long"].labels == {}
        for name in ("long", "short"):
            assert torch.equal(a.views[name].data, b.views[name].data)
            assert torch.equal(a.views[name].seeds_P, b.views[name].seeds_P)


def test_a_batch_moves_with_its_labels(shards, car):
    (batch,) = batches(shards, {"unit": str(car)}, 1)
    moved = batch.to("meta").views["long"].labels["unit"]
    assert moved.ids.device.type == "meta"
    assert moved.rate_hz == 100.0


def test_a_position_is_refused_with_other_labels(shards, car, tmp_path):
    def loader(path):
        data = DataSpec(train=str(shards), workers=0, frame_labels={"unit": str(path)})
        return train_loader(data, {"long": VIEWS["long"]}, 2, 0, 0, 1, None)

    first = loader(car)
    next(first)
    state = first.state()
    loader(car).restore(state)
    changed_car = label(shards, tmp_path / "l", early=1)
    with pytest.raises(UserError, match="taken with other frame labels"):
        loader(changed_car).restore(state)


def test_a_sample_that_was_not_labelled_is_counted_as_bad(shards, tmp_path):
    lost = sorted(lengths_of(shards))[0]
    path = label(shards, tmp_path / "l", skip=(lost,))
    data = DataSpec(train=str(shards), workers=0, frame_labels={"unit": str(path)}, max_bad_share=1)
    ledger = tmp_path / "ledger.jsonl"
    loader = train_loader(data, {"long": VIEWS["long"]}, 3, 0, 0, 1, None, ledger)
    keys = {key for _ in range(8) for key in next(loader).keys}
    loader.close()
    assert lost not in keys
    line = json.loads(ledger.read_text().splitlines()[0])
    assert (line["reason"], line["key"]) == ("labels", lost)
    with pytest.raises(DamagedSampleError, match=f"{lost}: no labels 'unit'"):
        LabelBook.open({"unit": str(path)}, [shards], True).cut(lost, 0.0, HZ, float(HZ))


# ---------------------------------------------------------------- which side-cars


def test_one_name_may_have_a_side_car_per_folder(shards, other, car, tmp_path):
    second = label(other, tmp_path / "val")
    book = LabelBook.open({"unit": [str(car), str(second)]}, [shards, other], True)
    assert book.kinds == {"unit": LabelKind(100.0, 1)}
    for folder in (shards, other):
        for key, seconds in lengths_of(folder).items():
            ids = book.cut(key, 0.0, HZ, float(HZ))["unit"].ids[:, 0]
            count = min(100, round(100 * seconds))
            assert ids.tolist() == [*range(count), *[-1] * (100 - count)]
    blend = {str(shards): 1.0, str(other): 1.0}
    data = DataSpec(train=blend, workers=0, frame_labels={"unit": [str(car), str(second)]})
    loader = train_loader(data, {"long": VIEWS["long"]}, 2, 0, 0, 1, None)
    assert next(loader).views["long"].labels["unit"].ids.shape[1:] == (100, 1)
    loader.close()


def test_labels_of_other_shards_are_refused(shards, other, car):
    SideCar(car).check_shards(shards)
    with pytest.raises(UserError, match=r"mfcc\.safetensors: labels of other shards than .*val"):
        SideCar(car).check_shards(other)
    data = DataSpec(train=str(other), workers=0, frame_labels={"unit": str(car)})
    with pytest.raises(UserError, match=r"frame_labels\.unit: .*: labels of other shards than"):
        train_loader(data, {"long": VIEWS["long"]}, 2, 0, 0, 1, None)
    with pytest.raises(UserError, match=r"frame_labels\.unit: no file: labels of other"):
        LabelBook.open({"unit": []}, [shards], True)
    with pytest.raises(UserError, match="gone: no such side-car"):
        LabelBook.open({"unit": "gone"}, [shards], True)
    assert LabelBook.open({"unit": "gone"}, [shards], False).cars == {}


def test_a_moved_folder_keeps_its_labels(shards, car, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(shards)
    SideCar(car).check_shards(moved)


def test_side_cars_of_one_name_must_agree(shards, other, car, tmp_path):
    for what, changes in (
        ("source", {"source": changed(MFCC, layer=3)}),
        ("classes", {"classes": (501,)}),
    ):
        path = label(other, tmp_path / what, **changes)
        with pytest.raises(UserError, match=rf"differ in their {what}; label all folders with one"):
            LabelBook.open({"unit": [str(car), str(path)]}, [shards], True)
    twin = label(shards, tmp_path / "twin")
    with pytest.raises(UserError, match="label the same shards; name one of them"):
        LabelBook.open({"unit": [str(car), str(twin)]}, [shards], True)


# ---------------------------------------------------------------- collation by hand


SPECS = {
    "a": ViewSpec(modality="audio", crop_s=0.5, hz=1000),
    "v": ViewSpec(modality="video", fps=4, size=6),
    "t": ViewSpec(modality="text", length=5),
}
KINDS = {"x": LabelKind(100.0, 2)}


def view(length, rate, ids):
    data = torch.zeros(length, 6, 6, 3, dtype=torch.uint8) if rate == 4.0 else torch.ones(length)
    found = {"x": FrameLabels(torch.from_numpy(times(ids, 2)), 100.0)}
    return View(data, rate, 0.0, 1, labels=found)


def row(key, **views):
    return Item(key, key, 0, [], {name: [v] for name, v in views.items()})


@pytest.mark.parametrize("shared", [False, True])
def test_labels_are_packed_with_their_views(shared):
    rows = [row("k0", a=view(500, 1000.0, 50), v=view(4, 4.0, 100)), row("k1")]
    rows.append(row("k2", a=view(300, 1000.0, 27), v=view(2, 4.0, 50)))
    batch = pack(rows, SPECS, shared, KINDS).unpack()
    audio, video = (batch.views[name].labels["x"].ids for name in ("a", "v"))
    assert (audio.shape, video.shape) == ((2, 50, 2), (2, 100, 2))
    assert audio[0, :, 0].tolist() == list(range(50))
    assert audio[1, :, 1].tolist() == [*range(27), *[-1] * 23]
    assert video[1, :, 0].tolist() == [*range(50), *[-1] * 50]
    assert batch.views["t"].labels == {}


def test_a_view_without_items_has_labels_without_a_class():
    batch = pack([row("k0"), row("k1")], SPECS, False, KINDS).unpack()
    assert batch.views["a"].dummy
    assert batch.views["a"].labels["x"].ids.tolist() == [[[-1, -1]] * 50]
    assert collate([row("k0")], SPECS).views["a"].labels == {}


def test_labels_of_other_items_are_refused():
    batch = pack([row("k0", a=view(500, 1000.0, 50))], SPECS, False, KINDS).unpack()
    found = batch.views["a"]
    with pytest.raises(ValueError, match="labels 'x' of 1 items in a view of 3"):
        frame_ids(changed(found, data=found.data.expand(3, -1)), "x", 10, 50.0)


# ---------------------------------------------------------------- what is refused before training


def written(path, rows, classes=(10,), rate=100.0, seconds=None, centre=0.0):
    info = LabelInfo(Source("x", rate, centre), classes, "s")
    with writing(path, info) as writer:
        for i, (key, ids) in enumerate(rows.items()):
            length = len(ids) / rate if seconds is None else seconds[i]
            writer.add(key, np.reshape(ids, (len(ids), len(classes))), length)
    return SideCar(path)


EVEN = {"a": [0, 1, 2, 3] * 5, "b": [4, 5, 6, 7] * 5}


def test_good_labels_have_no_problem(tmp_path, car):
    good = written(tmp_path / "l", EVEN)
    assert check(good, 50.0) == check(good, 100.0, 2) == check(good, 100 / 3) == []
    assert check(SideCar(car), 50.0, max_missing=0.2) == []


@pytest.mark.parametrize("frame_hz", [40.0, 62.5, 200.0, 99.0])
def test_rates_that_do_not_fit_the_model(tmp_path, frame_hz):
    problems = check(written(tmp_path / "l", EVEN), frame_hz)
    assert any(f"labels at 100 Hz for a model of {frame_hz:g} frames" in p for p in problems)


def test_one_class_for_all(tmp_path):
    (problem,) = check(written(tmp_path / "l", {"a": [3] * 40}), 50.0)
    assert "l: uses 1 of 10 classes: nothing to predict; cluster again" in problem


def test_one_class_for_most(tmp_path):
    car = written(tmp_path / "l", {"a": [3] * 75 + [1, 2] * 12 + [0]})
    (problem,) = check(car, 50.0)
    assert "class 3 holds 75.0% of the labels (at most 70% may)" in problem
    assert check(car, 50.0, max_share=0.75) == []


def test_each_codebook_is_judged(tmp_path):
    ids = np.stack([np.arange(40) % 5, np.zeros(40, int)], axis=1)
    (problem,) = check(written(tmp_path / "l", {"a": ids}, (5, 7)), 50.0)
    assert "codebook 1 uses 1 of 7 classes" in problem


def test_samples_without_labels(tmp_path):
    car = written(tmp_path / "l", {**EVEN, "c": []})
    (problem,) = check(car, 50.0)
    assert "1 of 3 samples have no label (at most 1% may)" in problem
    (problem,) = check(car, 50.0, 4)  # one more that could not be read
    assert "2 of 4 samples have no label" in problem
    assert check(car, 50.0, 4, max_missing=0.5) == []


def test_labels_of_another_length(tmp_path):
    """The last window may leave up to a label uncovered, and a frame of the model is forgiven."""
    rows = {"a": [0, 1] * 49, "b": [2, 3] * 49, "c": [4, 5] * 47}
    car = written(tmp_path / "l", rows, seconds=[1.0, 1.0, 1.0], centre=0.0125)
    (problem,) = check(car, 50.0)
    assert "of 1 of 3 samples end more than a frame away" in problem
    assert "first c by -0.045 s" in problem
    half = written(tmp_path / "h", EVEN, seconds=[0.4, 0.4])  # made for twice the rate
    (problem,) = check(half, 50.0)
    assert "first a by -0.210 s" in problem


@pytest.mark.parametrize("frame_hz", [50.0, 100.0])
def test_windows_of_every_length_of_clip_fit(tmp_path, frame_hz):
    """Kaldi's windows (400/160 samples), shorter clips than a window, and clips without audio."""
    samples = [0, 1, 399, 400, 559, 560, *range(16000, 16320, 13)]
    counts = [max(0, 1 + (n - 400) // 160) for n in samples]
    rows = {f"k{n}": np.arange(c) % 10 for n, c in zip(samples, counts, strict=True)}
    car = written(tmp_path / "l", rows, seconds=[n / HZ for n in samples], centre=0.0125)
    assert check(car, frame_hz, max_missing=0.5) == []


def test_damaged_labels(tmp_path):
    car = written(tmp_path / "l", EVEN)
    data = bytearray(car.path.read_bytes())
    data[-1] ^= 1
    (tmp_path / "l2").write_bytes(data)
    (problem,) = check(SideCar(tmp_path / "l2"), 50.0)
    assert "the bytes of ids were changed" in problem
