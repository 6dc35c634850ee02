"""Small media files and shard folders made by tests, with flashes and clicks at known times."""

import io
import json
from fractions import Fraction

import av
import numpy as np

TICK = Fraction(1, 90_000)
CODECS = {
    "mp4": ("libx264", "aac"),
    "matroska": ("libx264", "aac"),
    "webm": ("libvpx", "libopus"),
}
H264 = {"preset": "veryfast", "threads": "1", "flags": "+bitexact", "crf": "18"}


def moving_frames(count, height=48, width=64, seed=0):
    """(T, H, W, 3) smooth colourful pictures that all differ."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    phase = rng.uniform(0, 6, 3)
    waves = [
        127 + 100 * np.sin(x / 9 + p + t / 3) * np.cos(y / 7 - t / 5)
        for t in range(count)
        for p in phase
    ]
    return np.stack(waves).reshape(count, 3, height, width).transpose(0, 2, 3, 1).astype(np.uint8)


def flash_frames(count, fps, flashes_s, height=48, width=64):
    """Black pictures; the frame shown at each flash is white."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for time in flashes_s:
        frames[round(time * fps)] = 255
    return frames


def tone(seconds, rate, hz=440.0):
    """(S,) a quiet tone."""
    return (0.2 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype("f4")


def click_wave(seconds, rate, clicks_s):
    """(S,) silence with a 2 ms burst that starts at each click."""
    wave = np.zeros(round(seconds * rate), "f4")
    burst = np.sin(2 * np.pi * 2000 * np.arange(round(0.002 * rate)) / rate)
    for time in clicks_s:
        first = round(time * rate)
        low = max(first, 0)
        part = burst[low - first :][: max(0, len(wave) - low)]
        wave[low : low + len(part)] = 0.9 * part
    return wave


def write_media(
    frames=None,
    wave=None,
    *,
    container="mp4",
    fps=10,
    rate=16000,
    video_at=0.0,
    audio_at=0.0,
    video_codec=None,
    audio_codec=None,
    options=None,
    times_s=None,
    pix_fmt="yuv420p",
    rotation=0,
):
    """Bytes of a file; `video_at` and `audio_at` are the absolute starts in seconds."""
    vcodec, acodec = CODECS.get(container, (None, None))
    sink = io.BytesIO()
    muxer = {"fflags": "+bitexact"}
    with av.open(sink, "w", format=container, options=muxer) as out:
        video = audio = None
        if frames is not None:
            video = out.add_stream(
                video_codec or vcodec, rate=fps, options={**H264, **(options or {})}
            )
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = pix_fmt
            video.codec_context.time_base = TICK
            if rotation:
                video.set_display_rotation(rotation)
        if wave is not None:
            audio = out.add_stream(
                audio_codec or acodec, rate=rate, layout="mono" if wave.ndim == 1 else "stereo"
            )
        packets = []
        if video is not None:
            packets += _video_packets(video, frames, fps, video_at, times_s)
        if audio is not None:
            packets += _audio_packets(audio, wave, rate, audio_at)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            out.mux(packet)
    return sink.getvalue()


def _video_packets(stream, frames, fps, start_s, times_s):
    packets = []
    for k, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        time = k / fps if times_s is None else times_s[k]
        frame.pts, frame.time_base = round((start_s + time) / TICK), TICK
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def _audio_packets(stream, wave, rate, start_s):
    packets = []
    samples = np.atleast_2d(wave)
    layout = "mono" if len(samples) == 1 else "stereo"
    kind = stream.codec_context.format.name
    for begin in range(0, samples.shape[1], 960):
        block = samples[:, begin : begin + 960]
        if kind.startswith("s16"):
            block = (block * 32767).astype(np.int16)
        elif kind.startswith("s32"):
            block = (block * (2**31 - 1)).astype(np.int32)
        block = block if kind.endswith("p") else block.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format=kind, layout=layout)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = round(start_s * rate) + begin
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def write_corpus(folder, count=12, seconds=1.0, fps=10, lacks=(), size=(32, 32), splits=None):
    """Tiny clips and a manifest; row k lacks the modality lacks[k % len(lacks)]."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(count):
        lack = lacks[k % len(lacks)] if lacks else None
        frames = moving_frames(round(seconds * fps), *size, seed=k)
        wave = tone(seconds, 16000, 300 + 50 * k)
        data = write_media(
            None if lack == "video" else frames, None if lack == "audio" else wave, fps=fps
        )
        name = f"clip{k:03d}.{'m4a' if lack == 'video' else 'mp4'}"
        (folder / name).write_bytes(data)
        line = {
            "media": name,
            "caption": None if lack == "text" else f"clip number {k} shows a moving pattern",
            "source": f"source {k // 2}",
            "has": [m for m in ("audio", "video", "text") if m != lack],
            "meta": {"number": k},
        }
        if splits:
            line["split"] = splits[k % len(splits)]
        lines.append(line)
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest
