"""Decoding on one clock: alignment, selection, resampling, decoders that agree, refused files."""

import io
import itertools
import os
import sys
import types
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from media_files import click_wave, flash_frames, moving_frames, tone, write_media

from mmssl.data import backends, decode, media
from mmssl.data.decode import ClipReader
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.media import Limits
from mmssl.data.samples import Record
from mmssl.types import UserError
from mmssl.views.plan import Need

EVENTS = (0.6, 1.1, 1.7)
FPS = 10
X265 = "log-level=none:pools=1:frame-threads=1"


def record(video=None, sound=None, captions=(), has=None):
    found = {"audio", "video"} if video is not None else {"audio"} if sound else set()
    found |= {"text"} if captions else set()
    return Record("k", "s", 0, frozenset(found if has is None else has), captions, {}, video, sound)


def read(need, decoder="auto", **fields):
    with ClipReader(record(**fields), decoder=decoder) as reader:
        return reader.clip(need)


def onsets(wave_S, rate, count, level):
    """Times at which the waveform first exceeds the level, 0.2 s apart at least."""
    times, last = [], -1.0
    for sample in np.flatnonzero(np.abs(wave_S) > level):
        if sample / rate - last > 0.2:
            times.append(sample / rate)
        last = sample / rate
    assert len(times) == count
    return times


@pytest.mark.parametrize("offset", [-0.5, -0.23, 0.0, 0.013, 0.37, 0.5])
@pytest.mark.parametrize(
    ("container", "rate", "audio_codec"),
    [
        ("mp4", 16000, "aac"),
        ("mp4", 48000, "libopus"),
        ("matroska", 44100, "aac"),
        ("matroska", 16000, "flac"),
        ("webm", 48000, "libopus"),
    ],
)
def test_flash_and_click_keep_together(container, rate, audio_codec, offset):
    """R16: events at known times on the clip's clock; audio starts `offset` s after video."""
    frames = flash_frames(25, FPS, EVENTS)
    wave = click_wave(2.5 - offset, rate, [t - offset for t in EVENTS])
    data = write_media(
        frames,
        wave,
        container=container,
        rate=rate,
        audio_codec=audio_codec,
        video_at=max(0.0, -offset),
        audio_at=max(0.0, offset),
    )
    times = tuple(k / FPS for k in range(25))
    clip = read(Need(16000, 0.0, 2.5, times), video=data)
    bright_T = clip.frames.float().mean((1, 2, 3))
    seen = clip.frame_times_s[bright_T > 128].tolist()
    assert seen == pytest.approx(EVENTS, abs=0.5 / FPS)
    heard = onsets(clip.waveform[0].numpy(), 16000, len(EVENTS), 0.2)
    assert heard == pytest.approx(EVENTS, abs=0.003)
    assert clip.waveform.shape == (1, 40000)
    if offset > 0.1:  # nothing was recorded yet
        assert clip.waveform[0, : int((offset - 0.02) * 16000)].abs().max() < 0.02


@pytest.mark.parametrize(("rate", "start"), [(16000, 2.5), (44100, 1.5), (22050, 3.0)])
def test_audio_window_equals_the_whole_clip_cut(rate, start):
    """Starting in the middle of a file gives the samples that decoding everything gives."""
    # Tones, since AAC codes noise as "noise of this power" and draws it anew in every decoding.
    wave = tone(5.0, rate, 330.0) + tone(5.0, rate, 1234.5)
    data = write_media(moving_frames(50), wave, rate=rate)
    whole = read(Need(16000, 0.0, 5.0), video=data).waveform[0]
    part = read(Need(16000, start, start + 0.5), video=data).waveform[0]
    first = round(start * 16000)
    assert (part - whole[first : first + 8000]).abs().max() < 1e-5


def test_resampling_keeps_frequency_level_and_phase():
    wave = tone(2.0, 48000, 1000.0)
    data = write_media(None, wave, container="matroska", rate=48000, audio_codec="flac")
    out = read(Need(16000, 0.25, 1.75), sound=data).waveform[0].numpy()
    expected = 0.2 * np.sin(2 * np.pi * 1000 * (0.25 + np.arange(24000) / 16000))
    assert np.abs(out - expected).max() < 1e-3


def test_gap_in_audio_is_silence_of_its_length():
    """Time stamps that jump leave silence; nothing after it moves."""
    rate = 16000
    data = write_media(
        flash_frames(30, FPS, [2.5]),
        click_wave(3.0, rate, [0.5, 2.5]),
        container="matroska",
        audio_codec="flac",
    )
    with ClipReader(record(video=data)) as reader:
        track = reader._audio
        kept = [p for p in track.packets if not 1.0 < p.pts * track.tick_s < 2.0]
        track.packets[:] = kept
        clip = reader.clip(Need(rate, 0.0, 3.0))
    assert onsets(clip.waveform[0].numpy(), rate, 2, 0.2) == pytest.approx([0.5, 2.5], abs=0.002)


def test_stereo_and_integer_formats_become_mono_full_scale_one():
    left, right = tone(1.0, 16000, 400), tone(1.0, 16000, 900)
    data = write_media(None, np.stack([left, right]), container="wav", audio_codec="pcm_s16le")
    clip = read(Need(16000, 0.0, 1.0), sound=data)
    assert np.abs(clip.waveform[0].numpy() - (left + right) / 2).max() < 1e-4


def test_chosen_frames_are_the_nearest_ones():
    frames = moving_frames(30)
    data = write_media(frames, tone(3, 16000), options={"g": "7"})
    every = read(Need(frame_times_s=tuple(k / FPS for k in range(30))), video=data).frames
    assert (every.float() - torch.from_numpy(frames).float()).abs().mean() < 6
    wanted = (0.04, 0.06, 1.449, 1.451, 2.97)
    clip = read(Need(frame_times_s=wanted), video=data)
    assert clip.frame_times_s.tolist() == pytest.approx([0.0, 0.1, 1.4, 1.5, 2.9])
    assert torch.equal(clip.frames, every[[0, 1, 14, 15, 29]])


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"bf": "3"}),
        ("libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=8"}),
        ("libx265", {"x265-params": f"{X265}:open-gop=1:keyint=8:bframes=3"}),
    ],
)
def test_b_frames_change_nothing(codec, options):
    """Skipped disposable packets and open groups of pictures give the frames of a full decode."""
    data = write_media(moving_frames(40), None, video_codec=codec, options={"g": "8", **options})
    with av.open(io.BytesIO(data)) as container:
        every = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    for wanted in itertools.chain(range(40), [slice(3, 40, 4)]):
        indices = [wanted] if isinstance(wanted, int) else list(range(40))[wanted]
        clip = read(Need(frame_times_s=tuple(k / FPS for k in indices)), video=data, has={"video"})
        assert clip.frame_times_s.tolist() == pytest.approx([k / FPS for k in indices])
        difference = np.abs(clip.frames.numpy().astype(int) - np.stack([every[k] for k in indices]))
        assert difference.max() <= 1  # PyAV's own conversion may round otherwise


def test_variable_frame_rate_uses_time_stamps():
    times = [0.0, 0.04, 0.5, 0.52, 1.3, 1.31]
    data = write_media(moving_frames(6), None, container="matroska", times_s=times)
    with ClipReader(record(video=data, has={"video"})) as reader:
        assert reader.frame_times_s == pytest.approx(times, abs=1e-3)
        clip = reader.clip(Need(frame_times_s=(0.3, 0.9, 1.0)))
    assert clip.frame_times_s.tolist() == pytest.approx([0.5, 0.52, 1.3], abs=1e-3)


def test_frames_are_scaled_to_the_short_side():
    grey = np.repeat(moving_frames(4, 48, 96)[..., :1], 3, axis=-1)  # colour is stored at half size
    data = write_media(grey, None)
    clip = read(Need(frame_times_s=(0.0, 0.1), short_side=24), video=data, has={"video"})
    assert clip.frames.shape == (2, 24, 48, 3)
    whole = read(Need(frame_times_s=(0.0, 0.1)), video=data, has={"video"}).frames.numpy()
    assert np.abs(clip.frames.numpy() - whole.reshape(2, 24, 2, 48, 2, 3).mean((2, 4))).max() <= 3


def test_rotation_is_applied():
    frames = moving_frames(3, 32, 48)
    data = write_media(frames, None, rotation=90)
    upright = write_media(frames, None)
    turned = read(Need(frame_times_s=(0.0,)), video=data, has={"video"}).frames[0]
    plain = read(Need(frame_times_s=(0.0,)), video=upright, has={"video"}).frames[0]
    assert turned.shape == (48, 32, 3)
    with av.open(io.BytesIO(data)) as container:
        degrees = next(container.decode(video=0)).rotation
    assert torch.equal(turned, torch.rot90(plain, degrees // 90, (0, 1)))


# --- decoders


def needs_of(count):
    return Need(frame_times_s=tuple(k / FPS for k in range(1, count, 3)))


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize(
    "extra", [{}, {"bf": "2"}, {"colorspace": "bt709", "color_primaries": "bt709"}]
)
def test_decord_gives_the_same_bits(codec, extra):
    pytest.importorskip("decord")
    options = {"g": "12", **extra}
    if codec == "libx265":
        options = {**options, "x265-params": f"{X265}:open-gop=0"}
    data = write_media(
        moving_frames(30, 64, 80), tone(3, 16000), video_codec=codec, options=options, audio_at=0.2
    )
    with ClipReader(record(video=data), decoder="decord") as reader:
        assert backends.choose("decord", reader._header, reader._video, 0) == "decord"
        theirs = reader.clip(needs_of(30))
    ours = read(needs_of(30), "pyav", video=data)
    assert torch.equal(ours.frames, theirs.frames)
    assert torch.equal(ours.frame_times_s, theirs.frame_times_s)


def test_torchcodec_gives_the_same_bits():
    try:
        backends.torchcodec_decoder()
    except UserError as error:
        if os.environ.get("MMSSL_ALL_DECODERS"):  # set in CI, where nothing may be skipped
            raise
        pytest.skip(str(error))
    data = write_media(moving_frames(30, 64, 80), None, options={"g": "12"})
    theirs = read(needs_of(30), "torchcodec", video=data, has={"video"})
    ours = read(needs_of(30), "pyav", video=data, has={"video"})
    assert torch.equal(ours.frames, theirs.frames)


def test_missing_torchcodec_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    data = write_media(moving_frames(5), None)
    with pytest.raises(UserError, match=r"torchcodec.*pyav"):
        read(needs_of(5), "torchcodec", video=data, has={"video"})


def test_torchcodec_without_ffmpeg_names_the_remedy(monkeypatch):
    """Its newer releases import without FFmpeg and fail at the first file."""
    package, decoders = types.ModuleType("torchcodec"), types.ModuleType("torchcodec.decoders")
    package.ffmpeg_major_version, decoders.VideoDecoder = None, object
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    with pytest.raises(UserError, match=r"no FFmpeg libraries.*apt-get install ffmpeg"):
        backends.torchcodec_decoder()


@pytest.mark.parametrize(
    "fields",
    [
        {"pix_fmt": "yuv444p"},
        {"video_codec": "libvpx", "container": "webm"},
        {"rotation": 90},
    ],
)
def test_other_files_go_to_pyav(fields):
    data = write_media(moving_frames(5), None, **fields)
    with ClipReader(record(video=data, has={"video"})) as reader:
        for decoder in ("decord", "torchcodec"):
            assert backends.choose(decoder, reader._header, reader._video, 0) == "pyav"


def test_scaled_frames_go_to_pyav():
    data = write_media(moving_frames(5, 48, 64), None)
    with ClipReader(record(video=data, has={"video"})) as reader:
        names = [backends.choose("decord", reader._header, reader._video, s) for s in (0, 48, 32)]
    assert names == ["decord", "decord", "pyav"]


# --- presence and clocks


def test_modalities_that_are_not_promised_are_ignored():
    data = write_media(moving_frames(10), tone(1.0, 16000), audio_at=0.3)
    with ClipReader(record(video=data, has={"audio"})) as reader:
        assert reader.has == {"audio"}
        assert reader.frame_times_s == []
        clip = reader.clip(Need(16000, 0.0, 0.5, (0.0,)))
    assert clip.frames is None
    # Without video the clock starts at the first stored sample, so the offset is gone.
    assert onsets(clip.waveform[0].numpy(), 16000, 1, 0.1)[0] < 0.08


def test_promised_but_absent_stream_is_damage():
    data = write_media(moving_frames(10), None)
    with pytest.raises(DamagedSampleError, match="promises \\['audio'\\]") as caught:
        ClipReader(record(video=data))
    assert caught.value.reason == "missing"


def test_separate_sound_starts_with_the_video():
    video = write_media(moving_frames(20), None, video_at=0.7)
    sound = write_media(None, click_wave(2.0, 16000, [0.5]), container="flac", audio_codec="flac")
    clip = read(Need(16000, 0.0, 2.0, (0.0,)), video=video, sound=sound)
    assert onsets(clip.waveform[0].numpy(), 16000, 1, 0.2) == pytest.approx([0.5], abs=0.002)
    assert clip.frame_times_s.tolist() == [0.0]


def test_text_only():
    with ClipReader(record(captions=("a dog",))) as reader:
        clip = reader.clip()
    assert (clip.captions, clip.duration_s, clip.waveform) == (["a dog"], 0.0, None)


def test_duration_is_that_of_the_frames():
    data = write_media(moving_frames(25), tone(3.0, 16000), video_at=0.4)
    with ClipReader(record(video=data)) as reader:
        assert reader.duration_s == pytest.approx(2.5, abs=1e-3)
        assert reader.stored_size == (64, 48)


# --- refused before decoding


def test_header_without_decoding():
    data = write_media(moving_frames(20), tone(2.0, 16000), audio_at=0.25)
    header = media.probe(data)
    assert (header.width, header.height, header.pix_fmt) == (64, 48, "yuv420p")
    assert (header.video_codec, header.audio_codec, header.rate, header.channels) == (
        "h264",
        "aac",
        16000,
        1,
    )
    assert header.fps == pytest.approx(FPS, rel=0.01)
    assert header.duration_s == pytest.approx(2.25, abs=0.1)
    assert header.audio_start_s == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize(
    ("limits", "reason", "message"),
    [
        (Limits(max_pixels=1000), "bomb", "64 x 48 exceed 1000 pixels"),
        (Limits(max_seconds=1.0), "bomb", "exceed the limit of 1 s"),
        (Limits(max_fps=5), "bomb", "frames/s exceed 5"),
        (Limits(max_channels=0), "header", "1 audio channels"),
    ],
)
def test_limits(limits, reason, message):
    data = write_media(moving_frames(20), tone(2.0, 16000))
    with pytest.raises(DamagedSampleError, match=message) as caught:
        ClipReader(record(video=data), limits)
    assert caught.value.reason == reason


def test_time_stamps_are_checked_where_the_header_says_nothing():
    """A million frames per second, or an hour in two frames, are seen in the packets."""
    fast = write_media(
        moving_frames(60), None, container="matroska", times_s=[k / 1000 for k in range(60)]
    )
    with pytest.raises(DamagedSampleError, match=r"frames in|frames/s"):
        ClipReader(record(video=fast, has={"video"}), Limits(max_fps=20))
    long = write_media(moving_frames(2), None, container="matroska", times_s=[0.0, 3600.0])
    with pytest.raises(DamagedSampleError) as caught:
        ClipReader(record(video=long, has={"video"}))
    assert caught.value.reason == "bomb"


@pytest.mark.parametrize(
    "data", [b"", b"not media at all", b"\x00" * 5000, b"RIFF\xff\xff\xff\xffWAVE"]
)
def test_garbage_is_refused(data):
    with pytest.raises(DamagedSampleError) as caught:
        ClipReader(record(video=data))
    assert caught.value.reason in ("header", "decode")


def test_truncated_and_mutated_files_never_escape():
    """Any damage ends as DamagedSampleError or decodes; nothing else is raised."""
    data = write_media(moving_frames(20), tone(2.0, 16000), container="matroska")
    rng = np.random.default_rng(0)
    need = Need(16000, 0.0, 2.0, tuple(k / FPS for k in range(20)))
    outcomes = set()
    for trial in range(120):
        damaged = bytearray(data[: rng.integers(len(data))] if trial % 3 == 0 else data)
        for place in rng.integers(len(damaged) or 1, size=rng.integers(1, 30)):
            if damaged:
                damaged[place] = rng.integers(256)
        try:
            with ClipReader(record(video=bytes(damaged))) as reader:
                clip = reader.clip(need)
            assert clip.waveform.shape == (1, 32000)
            assert torch.isfinite(clip.waveform).all()
            outcomes.add("decoded")
        except DamagedSampleError as error:
            outcomes.add(error.reason)
    assert "decoded" in outcomes
    assert len(outcomes) > 1


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_memory_does_not_grow(decoder):
    """A hundred further clips add less than 3 MB (decord's audio readers lose 0.7 MB each)."""
    psutil = pytest.importorskip("psutil")
    data = write_media(moving_frames(5), tone(0.5, 16000))
    need = Need(16000, 0.0, 0.5, tuple(k / FPS for k in range(5)))
    used = []
    for _ in range(2):
        for _ in range(100):
            read(need, decoder, video=data)
        used.append(psutil.Process().memory_info().rss)
    assert used[1] - used[0] < 3e6


# --- files that a muxer does not write


class Stub:
    """A container whose packets are given."""

    def __init__(self, packets, codec=True):
        disposition = av.stream.Disposition(0)
        fields = {"name": "h264", "thread_count": 0, "width": 0, "height": 0, "pix_fmt": None}
        context = types.SimpleNamespace(**fields) if codec else None
        self.stream = types.SimpleNamespace(
            index=0,
            type="video",
            time_base=Fraction(1, 10),
            codec_context=context,
            disposition=disposition,
            average_rate=10,
            start_time=0,
        )
        self.streams = types.SimpleNamespace(video=[self.stream], audio=[])
        self.packets, self.duration = packets, None
        self.format = types.SimpleNamespace(name="stub")

    def demux(self, streams):
        return iter(self.packets)


def packet(pts, size=10, discard=False):
    return types.SimpleNamespace(
        pts=pts, size=size, is_discard=discard, stream_index=0, duration=1, is_keyframe=True
    )


@pytest.mark.parametrize(
    ("packets", "message"),
    [
        ([], "the video stream is empty"),
        ([packet(0, discard=True)], "the video stream is empty"),
        ([packet(None)], r"without time stamps; re-encode .make_shards --reencode"),
    ],
)
def test_unusable_timelines(packets, message):
    with pytest.raises(DamagedSampleError, match=message) as caught:
        media.read_tracks(Stub(packets), True, True, Limits())
    assert caught.value.reason == "header"


def test_unusable_headers():
    with pytest.raises(DamagedSampleError, match="cannot decode its video stream"):
        media.read_header(Stub([], codec=False))
    with pytest.raises(DamagedSampleError, match="no frame size"):
        media.check_limits(media.read_header(Stub([])), Limits())
    with pytest.raises(DamagedSampleError, match="neither a video nor an audio"):
        media.check_limits(media.Header("stub", 1.0), Limits())


def test_discarded_packets_do_not_start_the_clock():
    """Frames before an edit list's start are decoded, but not shown."""
    track = media.read_tracks(
        Stub([packet(-2, discard=True), packet(0), packet(1)]), True, False, Limits()
    )["video"]
    assert (track.start_s, track.end_s, len(track.packets)) == (0.0, 0.2, 3)


def test_frames_that_never_come_out_are_replaced_by_the_nearest():
    """A packet may show nothing; the nearest picture that exists stands in."""
    data = write_media(moving_frames(12), None, options={"g": "3"})
    with ClipReader(record(video=data, has={"video"})) as reader:
        track = reader._video
        ghost = len(track.packets)
        track.packets.insert(5, track.packets[5])
        track.shown[:] = sorted(
            [(pts + (1 if i == 5 else 0), i + (i > 5)) for pts, i in track.shown]
        )
        clip = reader.clip(Need(frame_times_s=(0.5,)))
    assert len(clip.frames) == 1
    assert clip.frame_times_s[0] == pytest.approx(0.5, abs=0.01)
    assert ghost == 12


def test_streams_that_decode_to_nothing():
    data = write_media(moving_frames(3), tone(0.3, 16000))
    with ClipReader(record(video=data)) as reader:
        reader._video.packets[:] = [p for p in reader._video.packets if not p.is_keyframe]
        reader._video.shown[:] = [(p.pts, i) for i, p in enumerate(reader._video.packets)]
        with pytest.raises(DamagedSampleError, match="video stream decodes to nothing"):
            reader.clip(Need(frame_times_s=(0.1,)))
        reader._audio.packets.clear()
        with pytest.raises(DamagedSampleError, match="audio stream decodes to nothing"):
            decode._first_sample_s(reader._audio)


def test_decord_must_count_the_same_frames():
    data = write_media(moving_frames(6), None)
    with ClipReader(record(video=data, has={"video"}), decoder="decord") as reader:
        reader._video.shown.append(reader._video.shown[-1])
        reader._video.packets.append(reader._video.packets[-1])
        with pytest.raises(DamagedSampleError, match="decord counts 6 frames, the file has 7"):
            reader._frames(Need(frame_times_s=(0.0,)))
