"""Each measurement of an audit against what was planted, or against the standard's own numbers."""

import json
import math

import av
import faiss
import numpy as np
import pytest
from media_files import click_wave, flash_frames, moving_frames, tone, write_media

from data_tools.audit_clip import measure
from data_tools.audit_pictures import Pictures, av_offset
from data_tools.audit_sound import Sounds
from data_tools.audit_summary import SAME_PICTURES, SAME_SOUND, find_duplicates, flags_of
from data_tools.near import code_of, groups, near_pairs
from mmssl.data.integrity import DamagedSampleError
from mmssl.types import Sample

JOB = {"has": None, "start": 0.0, "end": None}


def measured(data, field="video", **job):
    fields = {field: data, "job": json.dumps(JOB | job).encode()}
    return measure(Sample("clip", (), fields))


def wav(wave, rate):
    return write_media(None, wave, container="wav", rate=rate, audio_codec="pcm_s16le")


def sine(seconds, rate, dbfs, hz=997.0):
    return 10 ** (dbfs / 20) * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [48000, 44100, 16000, 8000])
def test_loudness_of_the_calibration_tone(rate):
    """A mono sine of 997 Hz at 0 dBFS has -3.01 LUFS (ITU-R BS.1770)."""
    found = measured(wav(sine(5, rate, 0), rate), "sound")
    assert found["loudness_lufs"] == pytest.approx(-3.01, abs=0.05)
    assert found["peak_dbfs"] == pytest.approx(0, abs=0.01)
    assert found["audio_s"] == pytest.approx(5)


@pytest.mark.parametrize(
    "levels",
    [
        [(-23, 20)],
        [(-36, 10), (-23, 60), (-36, 10)],
        [(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)],
        [(-26, 20), (-20, 20.1), (-26, 20)],
    ],
)
def test_loudness_of_ebu_tech_3341(levels):
    """Minimum requirements 1, 3, 4 and 5: stereo, -23.0 LUFS within 0.1."""
    rate = 8000  # the filter's coefficients depend on it; the tone is below its Nyquist frequency
    wave = np.concatenate([sine(seconds, rate, level, 1000) for level, seconds in levels])
    found = measured(wav(np.stack([wave, wave]), rate), "sound")
    assert found["loudness_lufs"] == pytest.approx(-23.0, abs=0.1)


def test_silence_and_clipping():
    wave = np.concatenate([np.zeros(16000), sine(1, 16000, -20)])
    found = measured(wav(wave, 16000), "sound")
    assert found["silence_share"] == pytest.approx(0.5, abs=0.01)
    assert found["clipped_share"] == 0
    clipped = np.clip(sine(2, 16000, 20 * math.log10(2), 50), -1, 1)
    found = measured(wav(clipped, 16000), "sound")
    # a sine of amplitude 2 is above 1 for 2/3 of the time; the first sample of each run is no copy
    assert found["clipped_share"] == pytest.approx(2 / 3 - 100 / 16000, abs=0.005)
    assert flags_of({"has": ["audio"], **found}) == ["clipped"]
    nothing = measured(wav(np.zeros(16000), 16000), "sound")
    assert (nothing["loudness_lufs"], nothing["peak_dbfs"]) == (None, None)
    assert "audio_code" not in nothing
    assert flags_of(nothing) == ["silent"]


def test_samples_that_are_not_finite_and_sounds_of_a_few_milliseconds():
    wave = sine(0.5, 16000, -20).astype("f4")
    for bad in (np.inf, np.nan):
        wave[1000] = bad
        data = write_media(None, wave, container="wav", audio_codec="pcm_f32le")
        with pytest.raises(DamagedSampleError, match="not finite"):
            measured(data, "sound")
    for count in (40, 200):
        found = measured(wav(sine(count / 16000, 16000, -20), 16000), "sound")
        assert found["audio_s"] == pytest.approx(count / 16000)
        assert "audio_code" not in found


def test_stream_that_changes_its_channels_and_rate():
    parts = [
        write_media(None, wave.astype("f4"), container="adts", rate=rate, audio_codec="aac")
        for rate, wave in (
            (16000, sine(3, 16000, -20)),
            (16000, np.stack([sine(3, 16000, -20)] * 2)),
            (32000, sine(3, 32000, -20)),
        )
    ]
    alone = measured(parts[0], "sound")
    found = measured(b"".join(parts), "sound")
    assert found["audio_s"] == pytest.approx(9, abs=0.3)  # with the encoder's padding
    louder = 10 * math.log10((1 + 2 + 1) / 3)  # the energies of channels add up
    assert found["loudness_lufs"] == pytest.approx(alone["loudness_lufs"] + louder, abs=0.2)


def test_still_black_and_moving():
    still = measured(write_media(np.repeat(moving_frames(1), 30, 0)))
    assert still["motion"] < 0.5
    assert still["still_share"] >= 0.95
    assert flags_of(still) == ["still"]
    black = measured(write_media(np.zeros((30, 48, 64, 3), np.uint8)))
    assert black["black_share"] == 1
    assert black["video_code"] == ""
    assert flags_of(black) == ["still", "black"]
    moving = measured(write_media(moving_frames(30)))
    assert moving["still_share"] == 0
    assert flags_of(moving) == []


def test_motion_is_the_mean_absolute_difference():
    pictures = Pictures(4)
    for k, level in enumerate((0, 100, 100, 40)):
        frame = np.full((64, 64, 3), level, np.uint8)
        pictures.add(av.VideoFrame.from_ndarray(frame, format="rgb24"), k / 10)
    found = pictures.facts()
    assert found["motion"] == pytest.approx((100 + 0 + 60) / 3, abs=1)
    assert found["change"] == pytest.approx(100, abs=1)
    assert found["still_share"] == pytest.approx(1 / 3)


def test_segment_of_a_file():
    wave = np.concatenate([np.zeros(32000, "f4"), tone(2, 16000)])
    frames = np.concatenate([np.repeat(moving_frames(1), 20, 0), moving_frames(20)])
    data = write_media(frames, wave)
    first, last = (measured(data, start=s, end=s + 2) for s in (0.0, 2.0))
    assert (first["frames"], last["frames"]) == (20, 20)
    assert first["duration_s"] == pytest.approx(2)
    assert first["still_share"] >= 0.95
    assert last["still_share"] == 0
    assert first["silence_share"] > 0.9
    assert last["silence_share"] < 0.1
    with pytest.raises(DamagedSampleError, match="lies after the end"):
        measured(data, start=9.0)
    with pytest.raises(DamagedSampleError, match="lacks"):
        measured(write_media(frames), has=["audio", "video"])


@pytest.mark.parametrize("late_s", [-0.52, -0.2, 0.0, 0.12, 0.8])
def test_planted_offset_is_recovered(late_s):
    """Flashes at irregular times, clicks as much later as planted."""
    times = np.array([0.96, 1.6, 2.88, 3.2, 4.48, 5.76, 6.08])
    frames = flash_frames(200, 25, times)
    data = write_media(frames, click_wave(8, 16000, times + late_s), fps=25)
    found = measured(data)
    assert found["av_offset_s"] == pytest.approx(late_s, abs=1.5 / 25)
    assert ("offset" in flags_of(found)) == (abs(late_s) > 0.15)


def test_no_offset_where_none_can_be_told():
    rng = np.random.default_rng(0)
    times = np.arange(1, 250) / 25
    answers = [
        av_offset(rng.exponential(size=249), times, rng.exponential(size=1000).astype("f4"), 0.0)
        for _ in range(50)
    ]
    assert answers == [{}] * 50
    beats = np.zeros(249)
    beats[::10] = 1.0
    onsets = np.zeros(1000, "f4")
    onsets[::40] = 1.0
    assert av_offset(beats, times, onsets, 0.0) == {}
    assert av_offset(beats[:40], times[:40], onsets, 0.0) == {}


def test_start_gap_of_the_container():
    data = write_media(moving_frames(20), tone(2, 16000), container="matroska", audio_at=0.3)
    assert measured(data)["start_gap_s"] == pytest.approx(0.3, abs=0.03)


# ---------------------------------------------------------------- duplicates


def noises(seed, seconds=2.0, rate=16000):
    """Bursts of filtered noise, as different as sounds are."""
    rng = np.random.default_rng(seed)
    wave = np.zeros(round(seconds * rate))
    for _ in range(6):
        first, length = rng.integers(len(wave) - 4000), rng.integers(1000, 4000)
        hz = rng.uniform(100, 3500)
        burst = np.sin(2 * np.pi * hz * np.arange(length) / rate) * rng.uniform(0.05, 0.3)
        wave[first : first + length] += burst * np.hanning(length)
    return (wave + rng.normal(0, 0.002, len(wave))).astype("f4")


def blobs(seed, count=10, size=(48, 64)):
    """Coloured spots that drift."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] / size[0]
    out = np.zeros((count, *size, 3))
    for _ in range(6):
        at, way = rng.uniform(0, 1.3, 2), rng.uniform(-0.03, 0.03, 2)
        colour, wide = rng.uniform(-200, 200, 3), rng.uniform(0.05, 0.3)
        for t in range(count):
            far = (y - at[0] - t * way[0]) ** 2 + (x - at[1] - t * way[1]) ** 2
            out[t] += np.exp(-far / wide**2)[..., None] * colour
    return np.clip(128 + out, 0, 255).astype(np.uint8)


def codes(frames, wave, rate=16000):
    """Codes of what was never encoded."""
    pictures, sounds = Pictures(len(frames)), Sounds()
    for k, picture in enumerate(frames):
        pictures.add(av.VideoFrame.from_ndarray(picture, format="rgb24"), k / 10)
    for first in range(0, len(wave), 4096):
        frame = av.AudioFrame.from_ndarray(wave[None, first : first + 4096], "fltp", "mono")
        frame.sample_rate, frame.pts = rate, first
        sounds.add(frame, first / rate)
    return pictures.facts()["video_code"], sounds.facts()[0]["audio_code"]


def test_copies_are_found_and_200_clips_give_no_false_pair():
    distinct = [codes(blobs(k), noises(k)) for k in range(200)]
    copies = {}
    for k in range(6):
        frames, wave = blobs(k), noises(k)
        large = blobs(k, size=(96, 128))
        variants = [
            write_media(frames, wave, options={"crf": "32"}),
            write_media(large, wave, container="matroska"),
            write_media(frames, 0.25 * wave),
        ]
        copies[k] = [measured(data) for data in variants]
    for place, name, least in ((0, "video_code", SAME_PICTURES), (1, "audio_code", SAME_SOUND)):
        known = [pair[place] for pair in distinct]
        assert near_pairs(known, least) == []
        for k, found in copies.items():
            for copy in found:
                assert near_pairs([*known, copy[name]], least) == [(k, 200)]


def test_search_for_pairs_is_exact_enough_and_not_quadratic():
    import base64

    rng = np.random.default_rng(0)
    rows = rng.integers(-60, 60, (6000, 256)).astype(np.int8)
    near = np.clip(rows[:300].astype(int) + rng.integers(-4, 5, (300, 256)), -127, 127)
    texts = [base64.b85encode(r.astype(np.int8).tobytes()).decode() for r in (*rows, *near)]
    texts += texts[:2]
    faiss.cvar.indexIVF_stats.reset()
    found = near_pairs(texts, 0.98)
    wanted = {(k, 6000 + k) for k in range(300)} | {(0, 6300), (1, 6301)}
    assert set(found) <= wanted
    assert len(found) >= 0.98 * len(wanted)
    assert 0 < faiss.cvar.indexIVF_stats.ndis < 0.15 * 6300**2


def coded(*clips):
    """(sound, pictures, seconds) as measurements; equal numbers have equal codes, 0 has none."""
    rng = np.random.default_rng(0)
    kinds = {"audio_code": ((1, 32, 64), (16, 32)), "video_code": ((8, 32, 32), (8, 8))}
    books = [
        ["", *(code_of(rng.normal(0, 20, shape).astype("f4"), keep) for _ in range(3))]
        for shape, keep in kinds.values()
    ]
    return [
        {"number": n, "duration_s": s, "audio_code": books[0][a], "video_code": books[1][v]}
        for n, (a, v, s) in enumerate(clips)
    ]


@pytest.mark.parametrize(
    ("clips", "same"),
    [
        ([(1, 1, 5), (1, 2, 5), (1, 2, 5)], [[1, 2]]),  # a jingle before three films
        ([(1, 1, 5), (2, 2, 5), (1, 2, 5), (1, 2, 5)], [[2, 3]]),
        ([(1, 1, 5), (1, 0, 5), (1, 0, 5)], [[1, 2]]),  # with and without pictures
        ([(1, 0, 9), (1, 0, 5), (1, 0, 9), (1, 0, 5)], [[0, 2], [1, 3]]),  # steady sounds
        ([(1, 1, 5), (1, 2, 5), (2, 1, 5), (1, 0, 5), (0, 1, 5)], []),
    ],
)
def test_copies_among_clips_that_share_one_modality(clips, same):
    assert find_duplicates(coded(*clips)).clips == same


def test_groups():
    assert groups(6, [(0, 3), (3, 5), (1, 2)]) == [[0, 3, 5], [1, 2]]
    assert groups(3, []) == []
