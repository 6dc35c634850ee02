"""Opens the media of a row: files as evaluation opens them, arrays through the same interface.

Letters in shapes: S samples, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import av
import torch

from mmssl.data import media
from mmssl.data.backends import to_rgb
from mmssl.data.decode import ClipReader, resampler
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.media import Limits
from mmssl.data.samples import Record
from mmssl.embed.sources import Film, Row, Sound, Source
from mmssl.types import Clip, UserError
from mmssl.views.clip import nearest
from mmssl.views.plan import Need

# a user's own file is trusted to be as long as it says; the frame size is still checked
LIMITS = Limits(max_seconds=float("inf"))


class Reader(Protocol):
    """Media on one clock, any stretch of which can be asked for; see `ClipReader`."""

    has: frozenset[str]
    duration_s: float

    def clip(self, need: Need | None = None) -> Clip:
        """What a need names."""
        ...


class ArrayReader:
    """A sound or frames in memory."""

    def __init__(self, source: Sound | Film) -> None:
        self._source = source
        if isinstance(source, Sound):
            self.has, self.duration_s = frozenset({"audio"}), len(source.wave_S) / source.rate
        else:
            self.has = frozenset({"video"})
            self.duration_s = len(source.frames_THWC) / source.fps

    def clip(self, need: Need | None = None) -> Clip:
        """The whole sound at the rate that is asked for, or the frames nearest to the times."""
        clip = Clip("array", "array", 0, self.duration_s)
        if need is None:
            return clip
        if isinstance(self._source, Sound):
            wave_S, rate = self._source.wave_S, self._source.rate
            same = need.audio_hz == rate
            clip.audio_hz = need.audio_hz
            clip.waveform = (wave_S if same else resampler(rate, need.audio_hz)(wave_S))[None]
            return clip
        shown_T = torch.arange(len(self._source.frames_THWC), dtype=torch.float64)
        shown_T /= self._source.fps
        wanted = torch.tensor(need.frame_times_s, dtype=torch.float64)
        order = sorted(set(nearest(shown_T, wanted).tolist()))
        pictures = (
            av.VideoFrame.from_ndarray(frame_HWC.numpy(), format="rgb24")
            for frame_HWC in self._source.frames_THWC[order]
        )
        clip.frames = torch.from_numpy(to_rgb(list(pictures), need.short_side))
        clip.frame_times_s = shown_T[order]
        return clip


@contextmanager
def opened(row: Row, known: Collection[str]) -> Iterator[list[tuple[Reader, frozenset[str]]]]:
    """Readers of a row's media with the modalities that each serves.

    Modalities of one file are read on one clock; of a whole file those that are `known`.

    Raises:
        UserError: a file cannot be read or decoded, or lacks what is asked of it.
    """
    with ExitStack() as stack:
        try:
            yield [
                (stack.enter_context(_reader(row.name, source, wanted)), wanted)
                for source, wanted in _grouped(row, known)
            ]
        except (DamagedSampleError, OSError) as error:
            file = row.whole or next((s for s in row.sources.values() if isinstance(s, Path)), "")
            raise UserError(f"{row.name}: {file}: cannot be decoded ({error})") from error


def _grouped(row: Row, known: Collection[str]) -> list[tuple[Source, frozenset[str]]]:
    if row.whole is not None:
        streams = _streams(row.whole.read_bytes())
        found = frozenset(m for m, count in streams.items() if count and m in known)
        if not found:
            raise UserError(
                f"{row.name}: {row.whole} has no stream that the model reads in this space, which "
                f"holds {', '.join(known)}"
            )
        return [(row.whole, found)]
    groups: list[tuple[Source, frozenset[str]]] = []
    for modality, source in row.sources.items():
        if modality == "text":
            continue
        if groups and isinstance(source, Path | bytes) and groups[-1][0] == source:
            groups[-1] = (source, groups[-1][1] | {modality})
        else:
            groups.append((source, frozenset({modality})))
    return groups


@contextmanager
def _reader(name: str, source: Any, wanted: frozenset[str]) -> Iterator[Reader]:
    if isinstance(source, Sound | Film):
        yield ArrayReader(source)
        return
    data = source if isinstance(source, bytes) else source.read_bytes()
    record = Record(name, name, 0, wanted, (), {}, video=data, sound=None)
    try:
        reader = ClipReader(record, LIMITS)
    except DamagedSampleError as error:
        if error.reason != "missing":
            raise
        streams = _streams(data)
        lacking = ", ".join(m for m in sorted(wanted) if not streams[m])
        place = "the file" if isinstance(source, bytes) else source
        raise UserError(
            f"{name}, {lacking}: {place} has no {lacking}; leave it out, or put None in its place"
        ) from error
    with reader:
        yield reader


def _streams(data: bytes) -> dict[str, int]:
    header = media.probe(data, LIMITS)
    return {"audio": header.audio_streams, "video": header.video_streams}
