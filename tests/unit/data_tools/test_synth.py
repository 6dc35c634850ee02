"""Laws of the synthetic corpora: balance, timing, no give-away, exact repetition."""

import hashlib
import itertools
import json
import math
from collections import Counter
from fractions import Fraction

import av
import numpy as np
import pytest

from data_tools import synth, synth_media, synth_plan, synth_scenes, synth_sources, synth_sprites
from mmssl.types import UserError

RATE = synth_media.RATE
TIMES_T = synth_plan.frame_times(10)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def decode(path):
    """Frames (T, H, W, 3), their times in s, samples (S,) and the time of the first."""
    frames, times, parts, start = [], [], [], None
    with av.open(str(path)) as container:
        for packet in container.demux():
            for item in packet.decode():
                if isinstance(item, av.VideoFrame):
                    frames.append(item.to_ndarray(format="rgb24"))
                    times.append(item.time)
                else:
                    start = item.time if start is None else start
                    parts.append(item.to_ndarray()[0])
        rates = [stream.rate for stream in container.streams.audio]
    wave = np.concatenate(parts) if parts else None
    return np.array(frames), times, wave, start, rates


def iou(a_T4, b_T4):
    a_T4, b_T4 = np.asarray(a_T4), np.asarray(b_T4)
    sides = np.minimum(a_T4[:, 2:], b_T4[:, 2:]) - np.maximum(a_T4[:, :2], b_T4[:, :2])
    shared = np.clip(sides, 0, None).prod(axis=1)
    areas = [(b[:, 2:] - b[:, :2]).prod(axis=1) for b in (a_T4, b_T4)]
    return shared / (areas[0] + areas[1] - shared)


def objects_of(index, split="test", seed=0):
    """What the index-th clip shows, without writing it."""
    count = 1 + index % 2
    parts = synth_plan.roles(synth.CLASSES, seed, split, synth_plan.KINDS[count - 1], index // 2)
    rng = synth_plan.generator(seed, split, "clip", index)
    return synth._draw_objects(rng, parts[:count], TIMES_T)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("bouncing")
    return synth.generate_bouncing(out, {"train": 40, "val": 2, "test": 12}, seed=3, workers=1)


@pytest.fixture(scope="module")
def clips(corpus):
    return [line for split in synth_plan.SPLITS for line in read_lines(corpus / f"{split}.jsonl")]


# --- Bouncing Shapes


def test_bytes_depend_on_neither_workers_nor_corpus_size(corpus, tmp_path):
    counts = {"train": 10, "val": 2, "test": 3}
    first, again = digest(corpus), digest(synth.generate_bouncing(tmp_path, counts, 3, workers=2))
    media = {name for name in again if name.startswith("media")}
    assert len(media) == 15
    assert {name: again[name] for name in media} == {name: first[name] for name in media}
    assert again["val.jsonl"] == first["val.jsonl"]
    for split, count in counts.items():
        lines = (corpus / f"{split}.jsonl").read_text().splitlines()[:count]
        assert (tmp_path / f"{split}.jsonl").read_text().splitlines() == lines


def test_another_seed_gives_other_clips(corpus, tmp_path):
    synth.generate_bouncing(tmp_path, {"val": 2}, seed=4, workers=1)
    assert not set(digest(tmp_path).values()) & set(digest(corpus).values())


def test_no_clip_of_one_split_occurs_in_another(corpus, clips):
    assert len({line["source"] for line in clips}) == len(clips)
    hashes = [value for name, value in digest(corpus).items() if name.startswith("media")]
    assert len(hashes) == len(clips) == len(set(hashes))


def test_media_match_what_the_manifest_declares(corpus, clips):
    for line in clips:
        frames, times, wave, start, rates = decode(corpus / line["media"])
        assert ("video" in line["has"]) == (len(frames) > 0) == line["media"].endswith(".mp4")
        assert ("text" in line["has"]) == (line["caption"] is not None)
        assert ("audio" in line["has"]) == (wave is not None)
        if "video" in line["has"]:
            assert frames.shape == (40, 128, 128, 3)
            assert times == pytest.approx([k / 10 for k in range(40)], abs=1e-6)
        else:
            assert line["meta"]["boxes"] is None
        if wave is not None:
            assert (rates, start) == ([RATE], 0.0)
            assert 4 * RATE <= len(wave) < 4 * RATE + 1024  # the codec fills its last frame


def test_training_lacks_text_10_audio_5_video_5_percent_and_the_rest_nothing(clips):
    lacks = [synth_plan.lacking(0, "train", k) for k in range(1500)]
    assert Counter(lacks) == {"text": 150, "audio": 75, "video": 75, None: 1200}
    assert len({tuple(lacks[k : k + 20]) for k in range(0, 1500, 20)}) > 60
    for line in clips:
        if line["split"] != "train":
            assert line["has"] == ["audio", "video", "text"]
    kinds = [k % 2 for k, lack in enumerate(lacks) if lack == "video"]
    assert 20 < sum(kinds) < 55  # not tied to the kind of clip


@pytest.mark.parametrize("kind", synth_plan.KINDS)
def test_classes_and_sizes_are_balanced_exactly(kind):
    pairs = [synth_plan.roles(synth.CLASSES, 7, "train", kind, k) for k in range(750)]
    assert len(synth.CLASSES) >= 10
    for role in range(2):
        sizes = Counter((pair[role].name, pair[role].size) for pair in pairs)
        assert set(sizes.values()) == {25}
        assert len(sizes) == 3 * len(synth.CLASSES)
    assert all(heard.name != silent.name for heard, silent in pairs)
    assert len({(heard.name, silent.name) for heard, silent in pairs}) == 90
    for begin in range(0, 750, 10):
        assert len({heard.name for heard, _ in pairs[begin : begin + 10]}) == 10


def test_kinds_alternate_and_diameters_fit_their_size(clips):
    for k, line in enumerate(clips[:40]):
        meta = line["meta"]
        assert meta["kind"] == ("one", "two")[k % 2]
        assert (meta["silent_class"] is None) == (meta["kind"] == "one")
        low, high = synth_scenes.DIAMETERS[meta["size"]]
        assert 16 <= low <= meta["diameter"] <= high <= 36
        assert meta["color"] != meta["silent_color"]


def test_boxes_overlap_by_at_most_a_tenth_and_stay_inside():
    worst = 0.0
    for index in range(1, 200, 2):
        tracks = [o.boxes for o in objects_of(index)]
        assert all(t.min() > -1e-9 and t.max() < 128 + 1e-9 for t in tracks)
        worst = max(worst, iou(*tracks).max())
    assert 0 < worst <= 0.10


def test_silent_and_sounding_object_cannot_be_told_apart_by_look_or_motion():
    pairs = [objects_of(index, "train") for index in range(1, 801, 2)]
    facts = np.array(
        [
            [
                (o.path.size, math.hypot(*o.path.speed), len(o.path.hits()), *o.boxes.mean(axis=0))
                for o in pair
            ]
            for pair in pairs
        ]
    )
    difference = facts[:, 0] - facts[:, 1]
    z = difference.mean(axis=0) / (difference.std(axis=0) / math.sqrt(len(pairs)))
    assert np.abs(z).max() < 4
    for role in range(2):
        colours = Counter(pair[role].colour for pair in pairs)
        assert min(colours.values()) > 20


def test_rhythms_differ_and_hits_are_3_to_9_and_apart():
    for index in range(200):
        objects = objects_of(index)
        hits = [o.path.hits() for o in objects]
        assert all(3 <= len(h) <= 9 and np.diff(h).min() >= 0.18 for h in hits)
        if len(hits) == 2:
            near = np.abs(np.subtract.outer(hits[0], hits[1])) < 0.1
            assert near.any(axis=1).mean() <= 0.5


def test_the_box_touches_a_wall_at_each_hit_and_only_then():
    for index in range(40):
        path = objects_of(index)[0].path
        dense = np.arange(0, 4, 1 / 2000)
        x_TD = path.centres(dense)
        gap_T = np.minimum(x_TD - path.size / 2, 128 - path.size / 2 - x_TD).min(axis=1)
        at = np.diff(np.sign(np.diff(x_TD, axis=0)), axis=0).any(axis=1)  # turning points
        turns = dense[1:-1][at]
        groups = turns[np.r_[True, np.diff(turns) > 0.01]]
        assert groups == pytest.approx(path.hits(), abs=2e-3)
        touch = path.centres(np.array(path.hits()))
        walls = np.minimum(touch - path.size / 2, 128 - path.size / 2 - touch).min(axis=1)
        assert walls == pytest.approx(0, abs=1e-6)
        assert gap_T.min() >= -1e-9


def test_sounds_begin_at_the_hits_after_encoding(corpus, clips):
    errors = []
    for line in clips:
        if "audio" not in line["has"]:
            continue
        _, _, wave, _, _ = decode(corpus / line["media"])
        previous = -1.0
        for hit in line["meta"]["hits_s"]:
            centre = round(hit * RATE)
            before = np.abs(wave[centre - 480 : centre - 160])
            if hit - previous > 0.35 and before.max() < 0.02:  # the last sound has faded
                near = np.abs(wave[centre - 160 : centre + 480])
                threshold = max(0.1 * near.max(), 2 * before.max())
                errors.append((np.argmax(near > threshold) - 160) / RATE)
            previous = hit
    assert len(errors) > 100
    assert abs(np.median(errors)) < 0.002
    assert np.quantile(np.abs(errors), 0.95) < 0.005


def test_frames_show_the_object_where_the_boxes_say(corpus, clips):
    for line in clips[-12:]:
        frames, *_ = decode(corpus / line["media"])
        still = np.median(frames, axis=0)
        for t in (0, 13, 39):
            moved = np.linalg.norm(frames[t] - still, axis=-1)
            boxes = [line["meta"]["boxes"]["sounding"][t]]
            if line["meta"]["boxes"]["silent"]:
                boxes.append(line["meta"]["boxes"]["silent"][t])
            for x0, y0, x1, y1 in boxes:
                inside = moved[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)]
                assert inside.max() > 60
                moved[max(0, int(y0) - 3) : int(y1) + 4, max(0, int(x0) - 3) : int(x1) + 4] = 0
            assert moved.max() < 60


@pytest.mark.parametrize("name", synth.CLASSES)
def test_shapes_fill_their_box_and_keep_their_area_at_any_place_and_size(name):
    drawing = synth_scenes.draw_shape(name, np.array([100.0, 50.0, 200.0]))
    cover = drawing[..., 3]
    rows, columns = np.flatnonzero(cover.any(axis=1)), np.flatnonzero(cover.any(axis=0))
    assert max(rows[0], columns[0]) <= 2
    assert min(rows[-1], columns[-1]) >= 125
    stamp = synth_scenes.Stamp(drawing)
    for x, y, side in ((10.0, 20.0, 16.0), (33.37, 61.91, 27.3), (91.5, 0.0, 36.0)):
        frame = np.zeros((128, 128, 3))
        stamp.place(frame, np.array([x, y, x + side, y + side]))
        expected = 100.0 * cover.mean() * side**2
        assert frame[..., 0].sum() == pytest.approx(expected, rel=1e-9)
        seen = np.argwhere(frame[..., 0] > 0)
        assert (seen >= [math.floor(y), math.floor(x)]).all()
        assert (seen < [math.ceil(y + side), math.ceil(x + side)]).all()


def test_shapes_differ_from_each_other_at_the_smallest_size():
    masks = []
    for name in synth.CLASSES:
        frame = np.zeros((128, 128, 3))
        drawing = synth_scenes.draw_shape(name, np.ones(3))
        synth_scenes.Stamp(drawing).place(frame, np.array([0.0, 0, 16, 16]))
        masks.append(frame[:16, :16, 0])
    for a in range(len(masks)):
        for b in range(a):
            assert np.abs(masks[a] - masks[b]).mean() > 0.12


def test_every_background_contrasts_with_the_objects():
    for index in range(0, 60):
        rng = np.random.default_rng(index)
        rgb = [
            np.array(synth_scenes.COLOURS[c], float)
            for c in rng.permutation(list(synth_scenes.COLOURS))[:2]
        ]
        picture = synth_scenes.background(rng, rgb)
        for colour in rgb:
            assert np.quantile(np.linalg.norm(picture - colour, axis=-1), 0.001) > 70


def spectrum(name, diameter, seed):
    """Mean log spectrum over 40 log-spaced bands and its change from first to second half."""
    wave = synth_media.hit_sound(name, diameter, np.random.default_rng(seed))
    power = np.abs(np.fft.rfft(np.pad(wave, (0, 8192 - len(wave))))) ** 2
    edges = np.searchsorted(np.fft.rfftfreq(8192, 1 / RATE), np.geomspace(80, 7900, 41))
    bands = np.log([power[a : max(b, a + 1)].mean() + 1e-6 for a, b in itertools.pairwise(edges)])
    return (bands - bands.mean()) / bands.std()


def test_pitch_falls_with_size_for_every_class():
    for name in synth.CLASSES:
        centre = []
        for diameter in (16.0, 22.0, 29.0, 36.0):
            wave = synth_media.hit_sound(name, diameter, np.random.default_rng(0))
            power = np.abs(np.fft.rfft(wave)) ** 2
            octave = np.log2(np.fft.rfftfreq(len(wave), 1 / RATE) + 1)
            centre.append((power * octave).sum() / power.sum())
        assert all(np.diff(centre) < 0), name


def test_timbre_tells_the_class_at_unseen_sizes():
    seen = {(n, d): spectrum(n, d, 0) for n in synth.CLASSES for d in np.arange(16, 36.5, 1.0)}
    right = 0
    for name in synth.CLASSES:
        for diameter in np.arange(16.5, 36, 2.0):
            probe = spectrum(name, diameter, 1)
            nearest = min(seen, key=lambda key: np.linalg.norm(seen[key] - probe))
            right += nearest[0] == name
    assert right == 100


def test_captions_name_size_colour_shape_and_a_sound_of_their_own(clips):
    assert len({verb for verb, _ in synth.VERBS.values()}) == len(synth.CLASSES)
    assert len(set(synth.ONE_TEMPLATES)) >= 12
    assert len(set(synth.TWO_TEMPLATES)) >= 12
    for line in clips:
        meta, caption = line["meta"], line["caption"]
        if caption is None:
            continue
        assert f"{meta['size']} {meta['color']} {meta['class']}" in caption
        assert any(form in caption for form in synth.VERBS[meta["class"]])
        others = [n for n in synth.CLASSES if n not in (meta["class"], meta["silent_class"])]
        assert not any(form in caption for n in others for form in (n, *synth.VERBS[n]))
        if meta["kind"] == "two":
            assert f"{meta['silent_size']} {meta['silent_color']} {meta['silent_class']}" in caption
            assert not any(form in caption for form in synth.VERBS[meta["silent_class"]])


def test_zero_leaves_a_split_alone_and_a_rerun_replaces_the_manifest(tmp_path):
    (tmp_path / "val.jsonl").write_text("old\n")
    (tmp_path / "test.jsonl").write_text("old\n")
    synth.generate_bouncing(tmp_path, {"train": 0, "val": 1, "test": 0}, seed=0, workers=1)
    assert not (tmp_path / "train.jsonl").exists()
    assert len(read_lines(tmp_path / "val.jsonl")) == 1
    assert (tmp_path / "test.jsonl").read_text() == "old\n"
    assert not list(tmp_path.rglob("*.partial"))


def test_an_interrupted_run_leaves_no_manifest_and_no_half_file(tmp_path, monkeypatch):
    (tmp_path / "val.jsonl").write_text("old\n")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synth_media, "_write_audio", fail)
    with pytest.raises(KeyboardInterrupt):
        synth.generate_bouncing(tmp_path, {"val": 1}, seed=0, workers=1)
    assert not list(tmp_path.rglob("*.jsonl"))
    assert not list(tmp_path.rglob("0*.mp4"))


def test_the_largest_objects_find_paths():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        assert len(synth_scenes.sample_paths(rng, [48.4, 47.5], TIMES_T)) == 2


def test_impossible_boxes_end_with_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr(synth_scenes, "_PATH_TRIES", 10_000)
    with pytest.raises(RuntimeError, match="no paths without overlap"):
        synth_scenes.sample_paths(np.random.default_rng(0), [120.0, 120.0], TIMES_T)
    steps = (0.0, 64.0, 128.0, 192.0, 255.0)
    everything = [np.array(rgb) for rgb in itertools.product(steps, steps, steps)]
    with pytest.raises(RuntimeError, match="no background"):
        synth_scenes.background(np.random.default_rng(0), everything)


# --- Sounding Sprites


def write_wav(path, wave):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((wave * 32000).astype(np.int16)[None], "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_png(path, rgba_HWC):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width = rgba_HWC.shape[:2]
        stream.pix_fmt = "rgba"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba_HWC, format="rgba")))
        container.mux(stream.encode(None))


def drawing_of(place, variant):
    """A rectangle 48 wide and 96 high whose red tells the class and green the variant."""
    rgba = np.zeros((128, 128, 4), np.uint8)
    rgba[16:112, 40:88] = (60 + 60 * place, 40 + 80 * variant, 250, 255)
    return rgba


NAMES = ("bell", "owl", "siren")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three classes; folds 1 to 3 with three sounds each: a burst every 0.7 to 1 s."""
    root = tmp_path_factory.mktemp("raw")
    t = np.arange(5 * RATE) / RATE
    for c, name in enumerate(NAMES):
        for variant in range(3):
            write_png(root / "sprites" / name / f"{variant}.png", drawing_of(c, variant))
        for fold in (1, 2, 3):
            for take in range(3):
                period = 0.7 + 0.05 * take + 0.03 * fold
                wave = 0.5 * np.sin(2 * np.pi * 300 * (c + 1) * t) * (t % period < 0.2)
                source = 100 * fold + take // 2  # takes 0 and 1 come from one source
                write_wav(root / "sounds" / name / f"{fold}-{source}-{'ABC'[take]}.wav", wave)
    return root


def make_sprites(folders, out, **changes):
    options = {"n": {"train": 20, "val": 6}, "crops": 2, "seed": 1, "workers": 1, **changes}
    fold = options.pop("fold", 2)
    return synth.generate_sprites(out, folders / "sounds", folders / "sprites", fold, **options)


@pytest.fixture(scope="module")
def sprites(folders, tmp_path_factory):
    return make_sprites(folders, tmp_path_factory.mktemp("sprites"))


def test_sprites_repeat_on_two_workers(folders, sprites, tmp_path):
    make_sprites(folders, tmp_path, n={"train": 4, "val": 6}, crops=1, workers=2)
    first, again = digest(sprites), digest(tmp_path)
    assert again["val.jsonl"] == first["val.jsonl"]
    media = {name for name in again if name.startswith("media")}
    assert len(media) == 4 + 6 + 18
    assert {name: again[name] for name in media} == {name: first[name] for name in media}


def test_folds_sources_and_drawings_are_kept_apart(sprites):
    lines = {split: read_lines(sprites / f"{split}.jsonl") for split in synth_plan.SPLITS}
    sounds = {s: {(x["meta"]["class"], x["meta"]["sound"]) for x in v} for s, v in lines.items()}
    sources = {s: {x["source"] for x in v} for s, v in lines.items()}
    assert all(sound.startswith("2-") for _, sound in sounds["test"])
    assert not any(sound.startswith("2-") for _, sound in sounds["train"] | sounds["val"])
    assert not sources["train"] & sources["val"]
    for split, found in lines.items():
        shown = {x["meta"][k] for x in found for k in ("drawing", "silent_drawing")} - {None}
        assert shown == ({"2"} if split == "test" else {"0", "1"})
        for line in found:  # the unheard sound keeps to its split as well
            if line["meta"]["silent_sound"]:
                assert line["meta"]["silent_sound"].startswith("2-") == (split == "test")


def test_the_test_split_holds_every_sound_of_the_fold_crops_times_in_both_kinds(sprites):
    test = read_lines(sprites / "test.jsonl")
    count = Counter((x["meta"]["kind"], x["meta"]["class"], x["meta"]["sound"]) for x in test)
    assert len(count) == 2 * 3 * 3
    assert set(count.values()) == {2}
    silent = Counter((x["meta"]["class"], x["meta"]["silent_class"]) for x in test[1::2])
    assert set(silent.values()) == {3}
    assert all(x["has"] == ["audio", "video", "text"] for x in test)
    for line in test[1::2]:
        assert iou(*(line["meta"]["boxes"][k] for k in ("sounding", "silent"))).max() <= 0.1


def test_both_objects_pulse_with_sounds_of_their_own_class(sprites, folders):
    for line in read_lines(sprites / "test.jsonl")[:12]:
        _, _, wave, _, _ = decode(sprites / line["media"])
        box = np.array(line["meta"]["boxes"]["sounding"])
        height = box[:, 3] - box[:, 1]
        level = synth_sprites.loudness(wave[: 4 * RATE].astype(float), TIMES_T)
        assert np.corrcoef(height, level)[0, 1] > 0.99
        assert height.max() / height.min() > 1.5
        assert (box[:, 2] - box[:, 0]) == pytest.approx(height / 2, abs=0.03)
        if line["meta"]["silent_class"]:
            silent = np.array(line["meta"]["boxes"]["silent"])
            assert (silent[:, 3] - silent[:, 1]).max() > 1.5 * (silent[:, 3] - silent[:, 1]).min()


def test_boxes_fit_the_drawing_not_its_canvas(sprites):
    for line in read_lines(sprites / "test.jsonl")[0:12:2]:
        frames, *_ = decode(sprites / line["media"])
        for t in (3, 22):
            blue = np.array([60 + 60 * NAMES.index(line["meta"]["class"]), 200, 250.0])
            rows, columns = np.nonzero(np.linalg.norm(frames[t] - blue, axis=-1) < 50)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert found == pytest.approx(line["meta"]["boxes"]["sounding"][t], abs=2.5)


def test_without_pulsing_sizes_are_constant(folders, tmp_path):
    make_sprites(folders, tmp_path, n={}, crops=1, pulsing=False)
    for line in read_lines(tmp_path / "test.jsonl"):
        box = np.array(line["meta"]["boxes"]["sounding"])
        assert np.ptp(box[:, 3] - box[:, 1]) < 0.03
        assert line["meta"]["pulsing"] is False


def test_all_drawings_may_be_asked_for_in_the_test(folders, tmp_path):
    make_sprites(folders, tmp_path, n={"train": 6}, crops=1, test_drawings="all")
    test = [x["meta"] for x in read_lines(tmp_path / "test.jsonl")]
    shown = Counter((m["kind"], m["class"], m["drawing"]) for m in test)
    silent = Counter((m["silent_class"], m["silent_drawing"]) for m in test[1::2])
    assert shown == Counter({(k, c, d): 1 for k in synth_plan.KINDS for c in NAMES for d in "012"})
    assert silent == Counter({(c, d): 1 for c in NAMES for d in "012"})
    assert {x["meta"]["drawing"] for x in read_lines(tmp_path / "train.jsonl")} <= {"0", "1"}


def test_training_uses_all_sounds_evenly(folders):
    pool = [f"s{k}" for k in range(5)]
    picks = [synth_sprites._pick(pool, 0, turn, "train", "one", "bell") for turn in range(20)]
    assert set(Counter(picks).values()) == {4}
    assert picks[:5] != picks[5:10]


def test_crops_hold_half_of_the_energy_and_short_sounds_are_followed_by_silence():
    rng = np.random.default_rng(0)
    wave = np.zeros(9 * RATE)
    wave[8 * RATE : 8 * RATE + 800] = 0.1
    starts = []
    for _ in range(20):
        start, crop = synth_sprites.crop_sound(wave, rng)
        starts.append(start)
        assert 10 ** (-6 / 20) <= np.abs(crop).max() <= 10 ** (-1 / 20)
    assert min(starts) > 4
    assert len(set(starts)) > 10
    start, crop = synth_sprites.crop_sound(np.full(RATE, 0.1), rng)
    assert (start, len(crop)) == (0.0, 4 * RATE)
    assert not crop[RATE:].any()


def test_loudness_is_one_at_the_loudest_and_the_fourth_root_of_power_elsewhere():
    wave = np.r_[np.full(RATE, 0.01), np.full(RATE, 0.16)]
    level = synth_sprites.loudness(wave, np.array([0.5, 1.5]))
    assert level == pytest.approx([0.25, 1.0])


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "-1"], "--train -1"),
        (["--workers", "0"], "--workers 0"),
        (["--fps", "0"], "--fps 0"),
        (["--seed", "-2"], "--seed -2"),
        (["--sounds", "x"], "need all of --sounds DIR, --sprites DIR and --fold K"),
        (["--sprites", "x", "--fold", "1"], "need all of"),
        (["--fold", "1"], "--fold needs --sounds"),
        (["--crops", "2"], "--crops needs --sounds"),
        (["--no-pulse"], "--no-pulse needs --sounds"),
        (["--test-drawings", "all"], "--test-drawings needs --sounds"),
        (["--sounds", "x", "--sprites", "y", "--fold", "1", "--test", "3"], "--test is for Bounc"),
        (["--sounds", "no", "--sprites", "y", "--fold", "1"], "--sounds no: no such folder"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert synth.main(["--out", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_unknown_split_and_unwritable_folder(tmp_path):
    with pytest.raises(UserError, match="unknown split 'dev'"):
        synth.generate_bouncing(tmp_path, {"dev": 1}, 0, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        synth.generate_bouncing(tmp_path / "file", {"val": 1}, 0, 1)


def copy_of(folders, tmp_path):
    for path in folders.rglob("*.*"):
        target = tmp_path / path.relative_to(folders)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def test_bad_sprite_numbers(folders, tmp_path):
    with pytest.raises(UserError, match="--crops -1"):
        make_sprites(folders, tmp_path, crops=-1)
    with pytest.raises(UserError, match="--test-drawings some"):
        make_sprites(folders, tmp_path, test_drawings="some")
    with pytest.raises(UserError, match=r"--fold 9: the sounds have folds \[1, 2, 3\]"):
        make_sprites(folders, tmp_path, fold=9)


def test_bad_sound_folders(folders, tmp_path):
    raw = copy_of(folders, tmp_path / "raw")
    odd = raw / "sounds" / "owl" / "hoot.wav"
    odd.write_bytes(b"")
    with pytest.raises(UserError, match=r"hoot\.wav: sounds are called FOLD-SOURCE-TAKE"):
        make_sprites(raw, tmp_path / "out", n={}, crops=1)
    odd.rename(odd.with_name("2-1-A.wav"))
    with pytest.raises(UserError, match=r"2-1-A\.wav: cannot be read as audio"):
        make_sprites(raw, tmp_path / "out", n={}, crops=1)
    write_wav(odd.with_name("2-1-A.wav"), np.zeros(5 * RATE))
    with pytest.raises(UserError, match=r"2-1-A\.wav: holds nothing but silence"):
        make_sprites(raw, tmp_path / "out2", n={}, crops=1)
    for path in (raw / "sounds" / "owl").glob("[13]-*"):
        path.unlink()
    with pytest.raises(UserError, match="class 'owl' has no sound left for train"):
        make_sprites(raw, tmp_path / "out3")
    with pytest.raises(UserError, match="has 0 class folders"):
        synth_sources.list_sounds(raw / "sounds" / "bell")


def test_bad_drawings(folders, tmp_path):
    raw = copy_of(folders, tmp_path / "raw")
    last = raw / "sprites" / "siren" / "2.png"
    write_png(last, np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(UserError, match=r"2\.png: is transparent everywhere"):
        synth_sources.load_stamp(last)
    last.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2\.png: cannot be read as a picture"):
        synth_sources.load_stamp(last)
    for variant in "12":
        (raw / "sprites" / "siren" / f"{variant}.png").unlink()
    with pytest.raises(UserError, match="siren: holds 1 png drawings"):
        make_sprites(raw, tmp_path / "out", n={}, crops=1)
    assert not (tmp_path / "out").exists()
