"""Video decoders behind one small interface: chosen frames of one file as RGB.

PyAV reads everything. decord reads only what it was measured to read correctly, and gets PyAV's
time stamps; torchcodec is an optional third. All deliver the same bits on files that all of them
read.

Letters in shapes: T frames, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from mmssl.data.integrity import DamagedSampleError
from mmssl.data.media import Header, Track
from mmssl.types import UserError

Frames = tuple[NDArray[np.uint8], list[int]]  # (T, H, W, 3) and the pts of each frame


class Picked(NamedTuple):
    """What to decode: places in `track.shown`, ascending. short_side 0 keeps the stored size."""

    data: bytes
    header: Header
    track: Track
    order: Sequence[int]
    short_side: int


def choose(decoder: str, header: Header, track: Track, short_side: int) -> str:
    """Name of the decoder to use: `auto` and ineligible files go to PyAV."""
    if decoder in ("auto", "pyav"):
        return "pyav"
    return decoder if eligible(header, track, short_side) else "pyav"


def eligible(header: Header, track: Track, short_side: int) -> bool:
    """Whether decord and torchcodec read the file as PyAV does.

    They resize and rotate by rules of their own, open another stream where there are several, and
    give wrong frames after seeking to a key frame that leads pictures shown before it.
    """
    plain = header.video_codec in ("h264", "hevc") and header.pix_fmt == "yuv420p"
    whole = header.video_streams == 1 and len(track.shown) == len(track.packets)
    unscaled = short_side in (0, min(header.width, header.height))
    return plain and whole and unscaled and _closed(track) and rotation(track) == 0


def _closed(track: Track) -> bool:
    """Whether no picture is shown before the key frame that it follows in the file."""
    key_pts = None
    for packet in track.packets:
        if packet.is_keyframe:
            key_pts = packet.pts
        elif key_pts is None or packet.pts < key_pts:
            return False
    return True


def rotation(track: Track) -> int:
    """Degrees by which a player turns the picture; only a decoded frame tells."""
    context = track.stream.codec_context
    try:
        for packet in track.packets:
            for frame in packet.decode():
                return int(frame.rotation)
        return 0
    finally:
        context.flush_buffers()


def pyav_frames(job: Picked) -> Frames:
    """Decode from the key frame before the first wanted frame to the last wanted one."""
    wanted = [job.track.shown[k][0] for k in job.order]
    frames = _collect(job, set(wanted))
    if len(frames) < len(wanted):
        # Packets that show nothing (alternate references, leading pictures of an open group):
        # take the nearest of the frames that exist.
        every = _collect(job, None)
        if not every:
            raise DamagedSampleError("decode", "the video stream decodes to nothing")
        times = sorted(every)
        frames = {}
        for pts in wanted:
            best = min(times, key=lambda t: (abs(t - pts), t))
            frames[best] = every[best]
    pts_T = sorted(frames)
    return to_rgb([frames[p] for p in pts_T], job.short_side), pts_T


def _collect(job: Picked, wanted: set[int] | None) -> dict[int, Any]:
    """Decoded pictures by pts; with `wanted` only those, others cost as little as possible."""
    return {f.pts: f for f in _decoded(job, wanted) if wanted is None or f.pts in wanted}


def _decoded(job: Picked, wanted: set[int] | None) -> Iterator[Any]:
    track = job.track
    context = track.stream.codec_context
    runs = [(0, len(track.packets) - 1)] if wanted is None else _runs(job)
    for first, last in runs:
        for packet in track.packets[first : last + 1]:
            if wanted is not None and packet.is_disposable and packet.pts not in wanted:
                continue
            yield from packet.decode()
        yield from context.decode(None)
        context.flush_buffers()


def _runs(job: Picked) -> list[tuple[int, int]]:
    """Stretches of packets that must be decoded: from a key frame to the last frame that needs it.

    A key frame that is shown after a wanted frame only leads it: that one needs an earlier key
    frame.
    """
    packets = job.track.packets
    runs: list[tuple[int, int]] = []
    for index in sorted(job.track.shown[k][1] for k in job.order):
        first = index
        while first > 0 and not (
            packets[first].is_keyframe and packets[first].pts <= packets[index].pts
        ):
            first -= 1
        if runs and first <= runs[-1][1]:
            runs[-1] = (min(first, runs[-1][0]), max(index, runs[-1][1]))
        else:
            runs.append((first, index))
    return runs


def to_rgb(pictures: Sequence[Any], short_side: int) -> NDArray[np.uint8]:
    """(T, H, W, 3), scaled by swscale and turned upright."""
    reformatter = VideoReformatter()
    width, height = _scaled(pictures[0].width, pictures[0].height, short_side)
    smaller = width < pictures[0].width
    method = Interpolation.AREA if smaller else Interpolation.BICUBIC
    out_THWC = np.empty((len(pictures), height, width, 3), dtype=np.uint8)
    for target_HWC, picture in zip(out_THWC, pictures, strict=True):
        # Left to itself, swscale starts threads for every frame, which quadruples the cost.
        rgb = reformatter.reformat(picture, width, height, "rgb24", interpolation=method, threads=1)
        plane = rgb.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(height, plane.line_size)
        target_HWC[:] = rows[:, : width * 3].reshape(height, width, 3)
    turns = round(pictures[0].rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(out_THWC, turns, axes=(1, 2))) if turns else out_THWC


def _scaled(width: int, height: int, short_side: int) -> tuple[int, int]:
    if short_side == 0:
        return width, height
    factor = short_side / min(width, height)
    return max(short_side, round(width * factor)), max(short_side, round(height * factor))


def decord_frames(job: Picked) -> Frames:
    """Frames by decord; it counts them in display order, as `track.shown` does."""
    import decord

    reader = decord.VideoReader(io.BytesIO(job.data), ctx=decord.cpu(0), num_threads=1)
    if len(reader) != len(job.track.shown):
        raise DamagedSampleError(
            "decode", f"decord counts {len(reader)} frames, the file has {len(job.track.shown)}"
        )
    frames: NDArray[np.uint8] = reader.get_batch(list(job.order)).asnumpy()
    return frames, [job.track.shown[k][0] for k in job.order]


def torchcodec_frames(job: Picked) -> Frames:
    """Frames by torchcodec, an optional extra.

    Raises:
        UserError: see `torchcodec_decoder`.
    """
    decoder = torchcodec_decoder()(
        job.data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
    )
    frames: NDArray[np.uint8] = decoder.get_frames_at(list(job.order)).data.numpy()
    return frames, [job.track.shown[k][0] for k in job.order]


def torchcodec_decoder() -> Any:
    """The class torchcodec reads videos with.

    Raises:
        UserError: torchcodec or the FFmpeg libraries it stands on are missing, or do not fit.
    """
    remedy = (
        "install mmssl[torchcodec] and FFmpeg with shared libraries (apt-get install ffmpeg), or "
        "choose pyav; `mmssl doctor` tells more"
    )
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"data.decoder: torchcodec cannot be loaded ({_first_line(error)}); {remedy}"
        ) from error
    # Newer releases import without FFmpeg, for their image decoders, and fail at the first video.
    if getattr(torchcodec, "ffmpeg_major_version", 0) is None:
        raise UserError(f"data.decoder: torchcodec finds no FFmpeg libraries to load; {remedy}")
    return VideoDecoder


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


BACKENDS: dict[str, Callable[[Picked], Frames]] = {
    "pyav": pyav_frames,
    "decord": decord_frames,
    "torchcodec": torchcodec_frames,
}
