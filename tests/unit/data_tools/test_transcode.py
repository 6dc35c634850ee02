"""Re-encoded clips: the clock, the codecs of sound, rotation, odd sizes, variable rates, cuts."""

import io

import av
import numpy as np
import pytest
import torch
from media_files import click_wave, flash_frames, moving_frames, tone, write_media

from data_tools import transcode
from data_tools.transcode import Encoding
from mmssl.data.decode import ClipReader
from mmssl.data.media import DEFAULT_LIMITS, probe
from mmssl.data.samples import VIDEO_FIELDS, Record
from mmssl.types import UserError
from mmssl.views.plan import Need


def cut(data, start_s, end_s, text=""):
    return transcode.transcode(data, start_s, end_s, Encoding.parse(text), DEFAULT_LIMITS)


def clip_of(name, data, need):
    """What a loader would read."""
    pictures = name in VIDEO_FIELDS
    header = probe(data)
    has = {"video"} if pictures else set()
    has |= {"audio"} if header.audio_streams else set()
    record = Record(
        *("k", "s", 0, frozenset(has), (), {}),
        data if pictures else None,
        None if pictures else data,
    )
    with ClipReader(record) as reader:
        return reader.clip(need)


def with_gap(wave, rate, gap_s):
    """An mkv of FLAC whose second half comes later by a gap."""
    whole = write_media(None, wave, container="matroska", rate=rate, audio_codec="flac")
    sink, half = io.BytesIO(), len(wave) / rate / 2
    with av.open(io.BytesIO(whole)) as source, av.open(sink, "w", format="matroska") as out:
        stream = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.size:
                if packet.pts * packet.time_base >= half:
                    packet.pts += round(gap_s / packet.time_base)
                    packet.dts = packet.pts
                packet.stream = stream
                out.mux(packet)
    return sink.getvalue()


@pytest.mark.parametrize("codec", ["aac", "flac", "opus"])
@pytest.mark.parametrize("offset_s", [-0.5, 0.3])
def test_both_streams_are_cut_on_one_clock(codec, offset_s):
    """R16: a flash and a click stay where they were, within a frame and 5 ms."""
    events = [3.2, 4.5]
    data = write_media(
        flash_frames(60, 10, events),
        click_wave(6.0, 48000, [t - offset_s for t in events]),
        container="matroska",
        rate=48000,
        audio_at=offset_s,
    )
    name, out = cut(data, 2.5, 5.0, f"audio={codec},gop=5")
    assert (name, probe(out).audio_codec) == ("mp4", {"aac": "aac"}.get(codec, codec))
    clip = clip_of(name, out, Need(48000, 0.0, 2.5, tuple(k / 10 for k in range(25))))
    bright = clip.frame_times_s[clip.frames.float().mean((1, 2, 3)) > 128]
    assert bright.tolist() == pytest.approx([0.7, 2.0], abs=0.01)
    loud = np.flatnonzero(clip.waveform[0].abs().numpy() > 0.2) / 48000
    assert loud.min() == pytest.approx(0.7, abs=0.005)
    assert loud.max() == pytest.approx(2.002, abs=0.005)


@pytest.mark.parametrize(
    ("text", "name", "codec", "rate"),
    [
        ("", "m4a", "aac", 44100),
        ("audio=flac", "flac", "flac", 44100),
        ("audio=opus", "ogg", "opus", 48000),
        ("audio=flac,rate=16000,channels=1", "flac", "flac", 16000),
        ("audio=opus,rate=24000", "ogg", "opus", 48000),  # as all Opus, decoded at 48 kHz
    ],
)
def test_sound_alone(text, name, codec, rate):
    wave = np.stack([tone(2.0, 44100), tone(2.0, 44100, 660)])
    data = write_media(None, wave, container="wav", rate=44100, audio_codec="pcm_s16le")
    found, out = cut(data, 0.5, 1.5, text)
    header = probe(out)
    channels = 1 if "channels=1" in text else 2
    assert (found, header.audio_codec, header.rate) == (name, codec, rate)
    assert header.channels == channels
    clip = clip_of(name, out, Need(16000, 0.0, 1.0, ()))
    times = np.arange(16000) / 16000 + 0.5
    wanted = 0.1 * (np.sin(2 * np.pi * 440 * times) + np.sin(2 * np.pi * 660 * times))
    error = (clip.waveform[0].numpy() - wanted)[800:-800]
    assert np.square(error).mean() < 1e-3 * np.square(wanted).mean()


def test_flac_keeps_every_sample():
    wave = tone(1.0, 8000)
    data = write_media(None, wave, container="wav", rate=8000, audio_codec="pcm_s16le")
    _, out = cut(data, 0.25, 0.75, "audio=flac")
    with av.open(io.BytesIO(out)) as container:
        found = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    assert np.array_equal(found, (wave * 32767).astype(np.int16)[2000:6000])


def test_gaps_of_the_sound_stay():
    """What comes after a gap would else be early by it."""
    wave = click_wave(2.0, 16000, [0.4, 1.6])
    name, out = cut(with_gap(wave, 16000, 0.7), 0.0, 2.7, "audio=flac")
    clip = clip_of(name, out, Need(16000, 0.0, 2.7, ()))
    loud = np.flatnonzero(clip.waveform[0].abs().numpy() > 0.2) / 16000
    assert loud.min() == pytest.approx(0.4, abs=0.002)
    assert loud.max() == pytest.approx(2.302, abs=0.002)


def test_sound_that_drains_from_its_decoder_has_no_time(monkeypatch):
    """As the last frame of WMA; it follows the one before."""
    data, decoded = write_media(None, tone(1.0, 16000)), transcode._decoded
    whole = cut(data, 0.0, 1.0, "audio=flac")

    def draining(*args):
        frames = list(decoded(*args))
        frames[-1].pts = None
        return frames

    monkeypatch.setattr(transcode, "_decoded", draining)
    assert cut(data, 0.0, 1.0, "audio=flac") == whole


def test_a_cut_decodes_what_it_needs(monkeypatch):
    """The bytes are those of a cut that decodes all, from a file with open groups of pictures."""
    options = {"g": "10", "bf": "2", "x264-params": "open-gop=1"}
    data = write_media(
        moving_frames(60),
        tone(6.0, 16000),
        options=options,
        audio_codec="flac",
        container="matroska",
    )
    seen = []
    decoded = transcode._decoded
    monkeypatch.setattr(
        transcode, "_decoded", lambda *a: (seen.append(f) or f for f in decoded(*a))
    )
    texts = ("audio=flac", "audio=flac,fps=7,short_side=24")
    some = [cut(data, 3.51, 4.3, text) for text in texts]
    assert len(seen) < 70  # of 60 pictures and 21 blocks of sound, twice
    for kind in (transcode._Pictures, transcode._Sounds):
        monkeypatch.setattr(kind, "_needed", lambda *_: (0, None))
    assert [cut(data, 3.51, 4.3, text) for text in texts] == some


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_pictures_are_stored_upright(degrees):
    data = write_media(moving_frames(5, 32, 64), None, rotation=degrees)
    need = Need(0, 0.0, 0.0, tuple(k / 10 for k in range(5)))
    name, out = cut(data, 0.0, 0.5, "quality=5")
    header = probe(out)
    assert (header.width, header.height) == ((64, 32) if degrees == 180 else (32, 64))
    shown, stored = clip_of("mp4", data, need).frames, clip_of(name, out, need).frames
    assert shown.shape == stored.shape
    assert (shown.float() - stored.float()).abs().mean() < 3


@pytest.mark.parametrize(("size", "stored"), [((33, 47), (48, 32)), ((1, 1), (2, 2))])
def test_odd_sizes_become_even(size, stored):
    data = write_media(
        moving_frames(4, *size),
        None,
        container="matroska",
        video_codec="ffv1",
        pix_fmt="yuv444p",
        options={},
    )
    header = probe(cut(data, 0.0, 0.4)[1])
    assert (header.width, header.height, header.pix_fmt) == (*stored, "yuv420p")


def test_variable_frame_rate():
    """Stored times are kept; a rate asked for shows the latest frame at each of its ticks."""
    times = [0.0, 0.05, 0.4, 0.45, 0.9]
    data = write_media(
        moving_frames(5), None, container="matroska", times_s=times, options={"bf": "0"}
    )
    need = Need(0, 0.0, 0.0, tuple(times))
    kept = clip_of(*cut(data, 0.0, 1.0, "quality=5"), need)
    assert kept.frame_times_s.tolist() == pytest.approx(times, abs=1e-3)
    even = clip_of(*cut(data, 0.0, 1.0, "fps=5,quality=5"), Need(0, 0, 0, (0, 0.2, 0.4, 0.6, 0.8)))
    assert even.frame_times_s.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=1e-3)
    distance = (even.frames[:, None].float() - kept.frames[None].float()).abs().mean((2, 3, 4))
    assert distance.argmin(1).tolist() == [0, 1, 2, 3, 3]
    assert torch.isfinite(distance).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("audio=mp3", "audio=mp3: is none of aac, flac, opus"),
        ("audio=opus,rate=44100", "rate=44100: opus has 48000, 24000"),
        ("channels=6", "channels=6 is out of range"),
        ("rate=nan", "rate: 'nan' is no number"),
        ("fps=nan", "fps=nan is out of range"),
    ],
)
def test_wrong_options(text, message):
    with pytest.raises(UserError, match=message):
        Encoding.parse(text)
