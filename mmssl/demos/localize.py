"""`mmssl localize VIDEO [run=...] [out=...]`: where in the picture does the sound come from?

Writes a video with a heat map over the frames (its sound is kept) and a contact sheet. Videos of
any length are read in windows as long as the model's own clips.

Letters in shapes: P windows, T time bins, S cells of a bin, H rows, W columns, N bins of the video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmssl.data import media
from mmssl.data.collate import Item, collate
from mmssl.data.decode import ClipReader
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.samples import Record
from mmssl.demos import film
from mmssl.embed.media import LIMITS
from mmssl.embed.windows import window_starts
from mmssl.eval.embed import Encoder, frozen
from mmssl.eval.options import parse
from mmssl.specs import Spec, ViewSpec
from mmssl.types import Batch, UserError, View
from mmssl.views import clip as cutting
from mmssl.views.plan import Cut, Need, decode_side

Floats = NDArray[np.float64]

_OPEN_WINDOW_S = 4.0  # window of views that take whole clips
_WINDOWS = 4  # windows per batch
_SOUND_S = 10.0  # sound decoded at a time for the loudness strip


class LocalizeSpec(Spec):
    """What can be set behind `mmssl localize VIDEO`."""

    run: str = "runs/quickstart"
    which: Literal["ema", "best", "last"] = "ema"  # weights of the run
    out: str = "localize"  # folder of the overlay video and the contact sheet
    strength: float = Field(0.8, gt=0, le=1)  # opacity of the heat map at its peak
    width: int = Field(960, ge=64, le=3840)  # largest side of the overlay video, pixels


@dataclass(frozen=True)
class Heat:
    """Similarity of places and sound over a whole video.

    maps_NHW: scores; times_N: centres of their time bins (s, zero = first frame), ascending; whole:
    the maps cover the whole picture, else the largest square in its middle.
    """

    maps_NHW: Floats
    times_N: Floats
    whole: bool


def main(video: str, overrides: Sequence[str] = ()) -> None:
    """Write the overlay video and the contact sheet of a video, and print where they are.

    Raises:
        UserError: no such file or run, a file without pictures or without sound, a method without
            local scores.
    """
    for path in localize(Path(video), parse(LocalizeSpec, overrides)):
        print(path)


def localize(video: Path, options: LocalizeSpec) -> tuple[Path, Path]:
    """Paths of the overlay video and of the contact sheet.

    Raises:
        UserError: as `main`.
    """
    from mmssl.eval.load import load_model

    data = read(video)
    if not Path(options.run).is_dir():
        raise UserError(
            f"{options.run}: no such run folder; train one with `make quickstart` or name one "
            "with run=FOLDER"
        )
    model, spec, _ = load_model(Path(options.run), which=options.which)
    heat = heat_of(model, spec.views, data, video)
    style = film.Style(options.strength, options.width)
    out = Path(options.out)
    targets = out / f"{video.stem}_overlay.mp4", out / f"{video.stem}_sheet.png"
    shots = film.render(video, data, heat.maps_NHW, heat.times_N, heat.whole, style, targets[0])
    film.sheet(shots, heat.maps_NHW, heat.times_N, loudness(data, video), targets[1])
    return targets


def read(video: Path) -> bytes:
    """The bytes of a video that has pictures and sound.

    Raises:
        UserError: no such file, or what it lacks.
    """
    if not video.is_file():
        raise UserError(f"{video}: no such file")
    data = video.read_bytes()
    try:
        header = media.probe(data, LIMITS)
    except DamagedSampleError as error:
        raise UserError(f"{video}: cannot be read as a video ({error})") from error
    if header.video_streams == 0:
        raise UserError(f"{video}: has no pictures; give a file with video and audio")
    if header.audio_streams == 0:
        raise UserError(f"{video}: has no sound, so there is nothing to localize")
    return data


def heat_of(
    model: Encoder,
    views: Mapping[str, ViewSpec],
    data: bytes,
    video: Path,
    sound: bytes | None = None,
    told: Callable[[float], object] = lambda share: None,
) -> Heat:
    """Score maps of a whole video, window by window.

    Args:
        model: with local scores.
        views: the run's views.
        data: the file's bytes.
        video: its name, for messages.
        sound: another file whose sound is taken instead of the video's own.
        told: is called with the share of the video that is done.

    Raises:
        UserError: the file cannot be decoded, or the method has no local scores.
    """
    times: list[Floats] = []
    maps: list[Floats] = []
    try:
        with opened(data, sound) as reader, frozen([model]):
            for done, batch in _batches(reader, views):
                found = _maps(model, batch)
                if found is None:
                    raise UserError(
                        "the run's method has no map score (a `pairs` entry with score `map`), "
                        "so it cannot say where a sound comes from"
                    )
                times.append(found[1])
                maps.append(found[0])
                told(done)
            duration = reader.duration_s
    except DamagedSampleError as error:
        raise UserError(f"{video}: cannot be decoded ({error})") from error
    size = next((v.size for v in views.values() if v.modality == "video"), 0)
    order, places = _in_time(np.concatenate(times), duration)
    return Heat(np.concatenate(maps)[places], order, whole=size == 0)


def opened(data: bytes, sound: bytes | None = None) -> ClipReader:
    """A video with its own sound, or with that of another file from its beginning."""
    both = frozenset({"audio", "video"})
    record = Record("video", "video", 0, both, (), {}, video=data, sound=sound)
    return ClipReader(record, LIMITS, "pyav")


def _in_time(times_N: Floats, duration_s: float) -> tuple[Floats, NDArray[np.int64]]:
    """Ascending times inside the video, and their places; the last window may overlap others."""
    inside = np.flatnonzero(times_N < max(duration_s, float(times_N.min()) + 1e-6))
    order = inside[np.argsort(times_N[inside], kind="stable")]
    # two bins at one time (to a millisecond): the later window has seen more of what follows
    last = np.append(np.diff(times_N[order]) > 1e-3, True)
    kept = order[last]
    return times_N[kept], kept


def _batches(reader: ClipReader, views: Mapping[str, ViewSpec]) -> Iterator[tuple[float, Batch]]:
    """Batches of windows, and the share of them up to here."""
    lengths = [v.crop_s for v in views.values() if v.modality != "text"]
    window_s = max(lengths) or _OPEN_WINDOW_S
    starts = window_starts(reader.duration_s, window_s)
    for begin in range(0, len(starts), _WINDOWS):
        items = [_item(reader, views, s, window_s) for s in starts[begin : begin + _WINDOWS]]
        yield min(1.0, (begin + _WINDOWS) / len(starts)), collate(items, views)


def _item(
    reader: ClipReader, views: Mapping[str, ViewSpec], start_s: float, window_s: float
) -> Item:
    """One window as a row without text."""
    cut: dict[str, list[View]] = {}
    for name, spec in views.items():
        end_s = min(start_s + (spec.crop_s or window_s), reader.duration_s)
        view = _view(reader, Cut(name, spec, start_s, end_s, seed=0))
        cut[name] = [] if view is None else [view]
    return Item(f"{start_s:.3f}", "video", 0, [], cut)


def _view(reader: ClipReader, cut: Cut) -> View | None:
    if cut.spec.modality == "audio":
        need = Need(cut.spec.hz, cut.start_s, cut.end_s)
        return cutting.cut_audio(reader.clip(need), cut, training=False)
    if cut.spec.modality == "video":
        need = Need(frame_times_s=cut.frame_times_s, short_side=decode_side(cut.spec))
        return cutting.cut_video(reader.clip(need), cut, training=False)
    return None


def _maps(model: Encoder, batch: Batch) -> tuple[Floats, Floats] | None:
    """Maps (N, H, W) and times (N,) of the windows of a batch."""
    device = next(iter(model.parameters())).device
    dense = model.dense(batch.to(device))
    if dense is None:
        return None
    scores = model.score_maps(dense.video, dense.audio, dense.audio_valid).double().cpu().numpy()
    _, height, width = dense.grid
    return scores.reshape(-1, height, width), dense.times_s.double().cpu().numpy().reshape(-1)


def loudness(
    data: bytes, video: Path, points: int = 600, hz: int = 8000, sound: bytes | None = None
) -> Floats:
    """(points,) root mean square of the sound over the video, 1 = the loudest.

    Raises:
        UserError: the sound cannot be decoded.
    """
    power, count = np.zeros(points), np.zeros(points)
    try:
        with opened(data, sound) as reader:
            for start_s in np.arange(0.0, reader.duration_s, _SOUND_S):
                end_s = min(start_s + _SOUND_S, reader.duration_s)
                wave = reader.clip(Need(hz, start_s, end_s)).waveform
                if wave is None or wave.shape[1] == 0:
                    continue
                wave_S = wave[0].double().numpy()
                times_S = start_s + np.arange(len(wave_S)) / hz
                place_S = np.minimum(times_S / reader.duration_s * points, points - 1).astype(int)
                power += np.bincount(place_S, wave_S**2, points)
                count += np.bincount(place_S, minlength=points)
    except DamagedSampleError as error:
        raise UserError(f"{video}: its sound cannot be decoded ({error})") from error
    level = np.sqrt(power / np.maximum(count, 1))
    return np.asarray(level / max(level.max(), 1e-9))
