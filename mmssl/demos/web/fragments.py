"""Pieces of HTML: results, a video under its heat map, the map of the corpus.

`page.js` draws the heat over the video while it plays.

Letters in shapes: N bins over time, H rows, W columns.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from mmssl.demos.localize import Heat
from mmssl.demos.web.media import Kind
from mmssl.eval.pictures import heat, scaled
from mmssl.index.search import Hit

Floats = NDArray[np.float64]

_CURVE = (600, 60)  # width and height of the curves over time
_MAP = (900, 560, 16)  # width, height and margin of the map of the corpus


class Source(NamedTuple):
    """Where a browser finds a medium."""

    url: str
    kind: Kind


class Point(NamedTuple):
    """A row of the index on the map, with its vector (D,)."""

    id: str
    modality: str
    start_s: float
    end_s: float
    caption: str
    vector: Sequence[float]


def player(source: Source, start_s: float = 0.0, end_s: float = 0.0) -> str:
    """A picture, film or sound; of a stretch (s) the beginning is shown, playing ends with it."""
    if source.kind == "img":
        return f'<img src="{escape(source.url)}">'
    part = f"#t={start_s:.2f},{end_s:.2f}" if end_s > start_s else ""
    return (
        f'<{source.kind} src="{escape(source.url + part)}" controls preload="metadata">'
        f"</{source.kind}>"
    )


def missing(thumbnail: bytes | None, why: str) -> str:
    """What stands in place of a clip that cannot be played."""
    shown = "" if thumbnail is None else base64.b64encode(thumbnail).decode()
    picture = f'<img src="data:image/jpeg;base64,{shown}">' if shown else ""
    return f'{picture}<p class="mmssl-facts">{escape(why)}</p>'


def span(start_s: float, end_s: float) -> str:
    """A stretch of time in words; none for texts."""
    return f"{start_s:.1f}–{end_s:.1f} s" if end_s > start_s else ""


def results(hits: Sequence[Hit], players: Sequence[str]) -> str:
    """Cards of what was found, best first."""
    cards = []
    for rank, (hit, played) in enumerate(zip(hits, players, strict=True), 1):
        facts = " · ".join(
            part for part in (span(hit.start_s, hit.end_s), f"cosine {hit.cosine:.2f}") if part
        )
        cards.append(
            f'<div class="mmssl-card" data-key="{escape(hit.key)}">'
            f"{played}"
            f'<p class="mmssl-caption">{rank}. {escape(hit.caption or hit.key)}</p>'
            f'<p class="mmssl-facts"><span class="mmssl-badge mmssl-{hit.modality}">'
            f"{hit.modality}</span> {facts} · {hit.score:+.1f} σ</p></div>"
        )
    return f'<div class="mmssl-results">{"".join(cards)}</div>'


def stage(source: Source, found: Heat, levels_NHW: Floats, loudness_K: Floats) -> str:
    """A video with the canvas that `page.js` draws the heat on, over curves along time.

    Args:
        source: the video.
        found: times and place of the maps.
        levels_NHW: the maps in [0, 1].
        loudness_K: in [0, 1], evenly spaced over the video.
    """
    maps = np.rint(255 * levels_NHW).astype(np.uint8)
    data = {
        "shape": maps.shape,
        "times": [round(float(t), 4) for t in found.times_N],
        "whole": found.whole,
        "maps": base64.b64encode(maps.tobytes()).decode(),
    }
    return (
        f"<div class=\"mmssl-stage\" data-heat='{json.dumps(data)}'>"
        f'<div class="mmssl-screen"><video src="{escape(source.url)}" controls loop></video>'
        f"<canvas></canvas></div>{_curves(levels_NHW.max(axis=(1, 2)), found.times_N, loudness_K)}"
        '<p class="mmssl-facts"><span class="mmssl-loud">■</span> loudness '
        '<span class="mmssl-peak">━</span> hottest place</p></div>'
    )


def _curves(peaks_N: Floats, times_N: Floats, loudness_K: Floats) -> str:
    width, height = _CURVE
    step = width / len(loudness_K)
    tops = (f"{k * step:.1f},{height * (1 - y):.1f}" for k, y in enumerate(loudness_K))
    end_s = times_N[-1] + (times_N[-1] - times_N[-2]) / 2 if len(times_N) > 1 else 2 * times_N[0]
    line = (
        f"{t / max(end_s, 1e-9) * width:.1f},{height * (1 - y):.1f}"
        for t, y in zip(times_N, peaks_N, strict=True)
    )
    return (
        f'<svg class="mmssl-curves" viewBox="0 0 {width} {height}" preserveAspectRatio="none">'
        f'<polygon points="0,{height} {" ".join(tops)} {width},{height}"/>'
        f'<polyline points="{" ".join(line)}"/><line y2="{height}"/></svg>'
    )


def palette() -> list[list[int]]:
    """Colours of the levels 0 to 255: from red on, for darker ones are lost in a picture."""
    colours: list[list[int]] = heat(np.linspace(0.4, 1, 256)).tolist()
    return colours


# ---------------------------------------------------------------- map of the corpus


def principal(points: Sequence[Point], centred: bool) -> Floats:
    """(N, 2) places of points along the two directions in which they vary most.

    centred: the mean of every modality is subtracted first, since modalities of one space lie
    apart. The same points give the same places.
    """
    x_ND = np.array([p.vector for p in points], dtype=np.float64)
    if centred:
        names = np.array([p.modality for p in points])
        for modality in set(names.tolist()):
            x_ND[names == modality] -= x_ND[names == modality].mean(axis=0)
    if len(x_ND) < 2:
        return np.zeros((len(x_ND), 2))
    return np.asarray(PCA(2, svd_solver="full").fit_transform(x_ND))


def corpus_map(points: Sequence[Point], places_N2: Floats, wanted: str | None) -> str:
    """Dots coloured by modality; those whose captions lack a wanted word are faint, and below."""
    width, height, margin = _MAP
    xs = margin + (width - 2 * margin) * scaled(places_N2[:, 0])
    ys = margin + (height - 2 * margin) * (1 - scaled(places_N2[:, 1]))
    asked = (wanted or "").lower().split()
    drawn: dict[bool, list[str]] = {True: [], False: []}  # faint dots first: clicks hit the last
    for point, x, y in zip(points, xs, ys, strict=True):
        faint = not all(word in point.caption.lower() for word in asked)
        words = (point.modality, span(point.start_s, point.end_s), point.caption)
        told = " ".join(word for word in words if word)
        drawn[faint].append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" data-row="{point.id}" '
            f'class="mmssl-{point.modality}{" mmssl-faint" if faint else ""}">'
            f"<title>{escape(told)}</title></circle>"
        )
    dots = "".join(drawn[True] + drawn[False])
    return f'<svg class="mmssl-map" viewBox="0 0 {width} {height}">{dots}</svg>'


def legend(shown: Mapping[str, int], held: Mapping[str, int]) -> str:
    """What the colours mean, and how many windows of those in the corpus are shown."""
    return " ".join(
        f'<span class="mmssl-badge mmssl-{modality}">{modality}</span> '
        f"{count}{f' of {held[modality]}' if count < held[modality] else ''} windows"
        for modality, count in shown.items()
    )
