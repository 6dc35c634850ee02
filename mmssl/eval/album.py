"""Pictures, spectrograms and captions of test clips, kept for the report.

Letters in shapes: T frames or bins, H rows, W columns, C colours, F bands, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.eval.embed import first_view, localizable
from mmssl.types import Batch, ViewBatch

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

_BANDS = 64


@dataclass
class Film:
    """Frames (T, H, W, 3) of a clip as the model sees them, and when they are shown (s)."""

    frames_THWC: Bytes
    times_T: Floats

    def at(self, time_s: float) -> Bytes:
        """The frame nearest in time."""
        return np.asarray(self.frames_THWC[self._nearest(time_s)])

    def shown_at(self, time_s: float) -> float:
        """When the frame nearest in time is shown (s)."""
        return float(self.times_T[self._nearest(time_s)])

    def _nearest(self, time_s: float) -> int:
        return int(np.abs(self.times_T - time_s).argmin())


@dataclass
class Example:
    """A retrieval query and what it found: row numbers, the own partner's rank (1 = first)."""

    query: int
    found: list[int]
    rank: int


@dataclass
class Shot:
    """A localization map at its highest cell.

    row: clip shown; heard: clip whose audio was used; time_s: of the frame shown; map_HW: its
    scores; sounding, silent: boxes in that frame (x0, y0, x1, y1 as shares of the picture); hit:
    which box holds the highest cell ("sounding", "silent", "both" or "neither").
    """

    row: int
    heard: int
    time_s: float
    map_HW: Floats
    sounding: Floats
    silent: Floats
    hit: str


@dataclass
class Album:
    """What the report shows; rows are numbered as in `embed.Rows`.

    `limit` pictures and spectrograms and `films` whole clips with boxes are kept, the first ones of
    the test set, so that memory stays bounded and nothing is picked by hand.
    """

    limit: int = 1000
    films: int = 24
    pictures: dict[int, Bytes] = field(default_factory=dict)
    spectra: dict[int, Floats] = field(default_factory=dict)
    captions: dict[int, str] = field(default_factory=dict)
    classes: dict[int, str] = field(default_factory=dict)
    clips: dict[int, Film] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    shots: list[tuple[Shot, Shot | None]] = field(default_factory=list)
    seen: int = 0

    def add(self, batch: Batch) -> None:
        """Keep what is wanted of a batch."""
        self._add_video(batch)
        self._add_audio(batch)
        self._add_words(batch)
        self.seen += batch.size

    def _rows(self, view: ViewBatch | None) -> list[tuple[int, int, int]]:
        """(item, row of the batch, row of the test set) of a view, inside the limit."""
        if view is None:
            return []
        rows = [(p, int(row), int(row) + self.seen) for p, row in enumerate(view.rows_P)]
        return [entry for entry in rows if entry[2] < self.limit]

    def _add_video(self, batch: Batch) -> None:
        view = first_view(batch, "video")
        for p, row, number in self._rows(view):
            assert view is not None  # _rows is empty otherwise
            count = int(view.lengths_P[p])
            frames = view.data[p, :count].cpu().numpy()
            self.pictures[number] = np.asarray(frames[count // 2])
            shown = localizable(batch.meta[row]) if batch.meta else False
            if shown and len(self.clips) < self.films:
                times = float(view.start_s_P[p]) + np.arange(count) / view.rate
                self.clips[number] = Film(frames, times)

    def _add_audio(self, batch: Batch) -> None:
        view = first_view(batch, "audio")
        for p, _, number in self._rows(view):
            assert view is not None
            wave = view.data[p, : int(view.lengths_P[p])].float().cpu()
            self.spectra[number] = spectrogram(wave, view.rate)

    def _add_words(self, batch: Batch) -> None:
        for row, meta in enumerate(batch.meta):
            if meta.get("captions"):
                self.captions[row + self.seen] = str(meta["captions"][0])
            if meta.get("class"):
                self.classes[row + self.seen] = str(meta["class"])


def spectrogram(wave_S: Tensor, hz: float) -> Floats:
    """(F, T) log-mel spectrogram scaled to [0, 1] over its upper 60 dB, low bands first."""
    with torch.inference_mode():
        power_FT = _mel(int(hz))(wave_S)
    level_FT = 10 * torch.log10(power_FT.clamp(min=1e-10))
    scaled = (level_FT - level_FT.max() + 60).clamp(min=0) / 60
    return np.asarray(scaled.double().numpy())


@lru_cache(maxsize=4)
def _mel(hz: int) -> Any:
    """The transform at a sampling rate; its filters take longer to make than to use."""
    from torchaudio.transforms import MelSpectrogram

    hop = max(1, hz // 50)
    return MelSpectrogram(hz, n_fft=4 * hop, hop_length=hop, n_mels=_BANDS, power=2.0)
