from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mmssl.eval.load
from data_tools.synth_media import RATE, write_clip
from mmssl.demos import film, localize
from mmssl.heads.dense import Dense
from mmssl.specs import ViewSpec
from mmssl.types import UserError

FPS, SECONDS, SIDE = 10, 5.0, 64
VIEWS = {
    "frames": ViewSpec(modality="video", crop_s=2.0, fps=5, size=32),
    "sound": ViewSpec(modality="audio", crop_s=2.0, hz=8000),
    "words": ViewSpec(modality="text"),
}


def corner(time_s):
    """Left upper corner of the bright square: it goes around the four quarters, one per second."""
    return [(0, 0), (32, 0), (32, 32), (0, 32)][int(time_s) % 4]


def bright_square(width=SIDE):
    frames = np.full((int(SECONDS * FPS), SIDE, width, 3), 30, np.uint8)
    left = (width - SIDE) // 2
    for k, frame in enumerate(frames):
        x, y = corner(k / FPS)
        frame[y + 4 : y + 28, left + x + 4 : left + x + 28] = 230
    return frames


def tone():
    t = np.arange(int(SECONDS * RATE)) / RATE
    return 0.4 * np.sin(2 * np.pi * 440 * t) * (t > 2.5)


class Brightness(nn.Module):
    """Local features are the mean brightness of 16 x 16 pixels of every frame."""

    def __init__(self, local=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.local = local

    def dense(self, batch):
        if not self.local:
            return None
        view = batch.views["frames"]
        cells = view.data.float().mean(-1).unfold(2, 16, 16).unfold(3, 16, 16).mean((-1, -2))
        count, times = cells.shape[:2]
        return Dense(
            video=cells.flatten(2)[..., None],
            audio=torch.ones(count, 1, 1),
            audio_valid=torch.ones(count, 1, dtype=torch.bool),
            present=torch.ones(count, dtype=torch.bool),
            grid=(times, 2, 2),
            times_s=view.start_s_P[:, None] + torch.arange(times) / view.rate,
        )

    def score_maps(self, video, audio, valid):
        return video[..., 0]


@pytest.fixture
def run(tmp_path, monkeypatch):
    class Spec:
        views = VIEWS

    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(
        mmssl.eval.load, "load_model", lambda run, which: (Brightness(), Spec(), None)
    )
    return folder


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.mp4"
    write_clip(path, bright_square(), tone(), FPS)
    return path


def options(run, tmp_path):
    return localize.LocalizeSpec(run=str(run), out=str(tmp_path / "out"))


def frames_of(path):
    with av.open(str(path)) as container:
        frames = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    return [t for t, _ in frames], [f for _, f in frames]


def packets_of(path):
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return [(bytes(p), float(p.pts * p.time_base)) for p in container.demux(stream) if p.size]


@pytest.mark.parametrize("duration", [0.5, 2.0, 2.1, 4.0, 7.3, 60.0])
def test_windows_cover_the_video(duration):
    starts = localize.window_starts(duration, 2.0)
    assert starts[0] == 0.0
    assert (np.diff(starts) <= 2.0 + 1e-9).all()
    assert (np.diff(starts) > 0).all()
    assert starts[-1] + 2.0 == pytest.approx(max(duration, 2.0))


def test_maps_follow_the_bright_square_through_all_windows(video):
    heat = localize.heat_of(Brightness(), VIEWS, video.read_bytes(), video)
    assert heat.times_N == pytest.approx(np.arange(25) / 5)
    for time_s, cells in zip(heat.times_N, heat.maps_NHW, strict=True):
        x, y = corner(time_s + 1e-6)
        assert cells.argmax() == (y > 0) * 2 + (x > 0)
    assert not heat.whole


def test_a_video_shorter_than_the_window(tmp_path):
    path = tmp_path / "short.mp4"
    write_clip(path, bright_square()[:7], tone()[: int(0.7 * RATE)], FPS)
    heat = localize.heat_of(Brightness(), VIEWS, path.read_bytes(), path)
    assert heat.times_N.max() < 0.7
    assert (np.diff(heat.times_N) > 0).all()


def test_overlay_and_contact_sheet(video, run, tmp_path):
    overlay, sheet = localize.localize(video, options(run, tmp_path))
    times, frames = frames_of(overlay)
    before, _ = frames_of(video)
    assert times == pytest.approx(before)
    assert packets_of(overlay) == packets_of(video)  # the sound is copied bit by bit
    assert frames[0].shape == (256, 256, 3)  # small pictures are enlarged
    for time_s, frame in zip(times, frames, strict=True):
        if time_s % 1 > 0.3 and time_s % 1 < 0.7:  # the map is between two quarters elsewhere
            x, y = (4 * v for v in corner(time_s))
            inner = frame[y + 40 : y + 88, x + 40 : x + 88].reshape(-1, 3).mean(axis=0)
            assert inner[0] > inner[2] + 60  # hot: far more red than blue
    with Image.open(sheet) as page:
        assert page.size == (10 + 4 * 330, 10 + 3 * 330 + 110)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "clip_overlay.mp4",
        "clip_sheet.png",
    ]


def test_only_the_middle_of_a_wide_picture_gets_a_map(run, tmp_path):
    path = tmp_path / "wide.mp4"
    write_clip(path, bright_square(width=128), tone(), FPS)
    overlay, _ = localize.localize(path, options(run, tmp_path))
    _, frames = frames_of(overlay)
    assert frames[0].shape == (128, 256, 3)
    edge = frames[20][:, :60].reshape(-1, 3).astype(int)
    assert np.abs(edge - 18).max() <= 12  # 0.6 x 30, no colour


def test_sound_that_mp4_cannot_hold_is_encoded_anew(run, tmp_path):
    path = tmp_path / "pcm.mkv"
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=FPS)
        pictures.width = pictures.height = SIDE
        sound = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for k, picture in enumerate(bright_square()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, FPS)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        samples = (tone()[None] * 32000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    overlay, _ = localize.localize(path, options(run, tmp_path))
    with av.open(str(overlay)) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
        wave = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    level = np.sqrt(np.mean(wave[: 2 * 16000] ** 2)), np.sqrt(np.mean(wave[3 * 16000 :] ** 2))
    assert level[0] < 0.01
    assert level[1] == pytest.approx(0.4 / np.sqrt(2), rel=0.1)


def test_loudness(video):
    level = localize.loudness(video.read_bytes(), video, points=50)
    assert level[:24].max() < 0.05
    assert level[26:49] == pytest.approx(np.ones(23), abs=0.15)


def test_levels_and_interpolation():
    maps = np.zeros((10, 4, 4))
    maps[3, 1, 1], maps[4, 2, 2] = 2.0, 4.0
    level = film.levels(maps)
    assert level.min() == 0.0
    assert level.max() == 1.0
    times = np.arange(10) * 0.5
    assert np.array_equal(film.map_at(level, times, 1.5), level[3])
    assert np.allclose(film.map_at(level, times, 1.75), (level[3] + level[4]) / 2)
    assert np.array_equal(film.map_at(level, times, -1.0), level[0])
    assert np.array_equal(film.map_at(level, times, 99.0), level[-1])


def test_what_is_wrong_with_the_input_is_said(run, tmp_path, monkeypatch, video):
    chosen = options(run, tmp_path)
    mute, blind = tmp_path / "mute.mp4", tmp_path / "blind.m4a"
    write_clip(mute, bright_square(), None, FPS)
    write_clip(blind, None, tone(), FPS)
    text = tmp_path / "words.mp4"
    text.write_text("not a video")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[:3000])
    for path, message in (
        (mute, "has no sound"),
        (blind, "has no pictures"),
        (text, "cannot be read as a video"),
        (cut, r"cut\.mp4: cannot be"),
        (tmp_path / "none.mp4", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            localize.localize(path, chosen)
    with pytest.raises(UserError, match="no such run folder"):
        localize.localize(video, localize.LocalizeSpec(run=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="did you mean `strength"):
        localize.main(str(video), ["strenght=0.5"])

    class Spec:
        views = VIEWS

    monkeypatch.setattr(
        mmssl.eval.load, "load_model", lambda run, which: (Brightness(False), Spec(), None)
    )
    with pytest.raises(UserError, match="no map score"):
        localize.localize(video, chosen)
    assert not (tmp_path / "out").exists()
