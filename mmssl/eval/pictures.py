"""Small pictures for reports and demos, and their page: heat maps, spectrograms, curves.

Letters in shapes: H rows, W columns, C colours, F bands, T time steps.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

SOUNDING, SILENT, PEAK = (54, 224, 122), (255, 92, 92), (255, 255, 255)

# dark violet over red and orange to pale yellow, evenly spaced
_HEAT = np.array(
    [
        (0, 0, 4),
        (40, 11, 84),
        (101, 21, 110),
        (159, 42, 99),
        (212, 72, 66),
        (245, 125, 21),
        (250, 193, 39),
        (252, 255, 164),
    ],
    dtype=np.float64,
)


def heat(values: ArrayLike) -> Bytes:
    """Colours (..., 3) of values in [0, 1]."""
    x = np.clip(np.asarray(values, dtype=np.float64), 0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(x, stops, _HEAT[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def scaled(values: ArrayLike, low: float | None = None, high: float | None = None) -> Floats:
    """Values between `low` and `high` (default: their own extremes) to [0, 1]; constants to 0."""
    x = np.asarray(values, dtype=np.float64)
    bottom = float(x.min()) if low is None else low
    top = float(x.max()) if high is None else high
    if top <= bottom:
        return np.zeros(x.shape)
    return np.asarray(np.clip((x - bottom) / (top - bottom), 0, 1))


def overlay(
    frame_HWC: Bytes, map_HW: ArrayLike, size: tuple[int, int], strength: float = 0.8
) -> Bytes:
    """A frame under its heat map, both resized to `size` (width, height).

    Args:
        frame_HWC: RGB picture.
        map_HW: values in [0, 1]; the higher, the less is seen of the frame.
        size: of the result, pixels.
        strength: opacity of the map where it is 1.
    """
    frame = Image.fromarray(frame_HWC).resize(size, Image.Resampling.BICUBIC)
    cells = Image.fromarray(np.asarray(map_HW, dtype=np.float32))
    level_HW = np.clip(np.asarray(cells.resize(size, Image.Resampling.BICUBIC)), 0, 1)
    alpha_HW1 = (strength * level_HW**1.5)[..., None]
    # the frame is dimmed a little, so that the map stands out on bright pictures, too
    mixed = 0.85 * np.asarray(frame) * (1 - alpha_HW1) + heat(level_HW) * alpha_HW1
    return np.asarray(np.rint(mixed).astype(np.uint8))


def mark_box(
    picture_HWC: Bytes, box: ArrayLike, colour: tuple[int, int, int], width: int = 2
) -> Bytes:
    """Outline of a box given as shares of the picture (x0, y0, x1, y1)."""
    image = Image.fromarray(picture_HWC)
    edges = np.asarray(box, dtype=np.float64).reshape(2, 2) * (image.width, image.height)
    ImageDraw.Draw(image).rectangle(
        [*edges[0], *np.maximum(edges[1], edges[0])], None, colour, width
    )
    return np.asarray(image)


def mark_peak(picture_HWC: Bytes, map_HW: ArrayLike) -> Bytes:
    """A cross on the centre of the highest cell."""
    cells = np.asarray(map_HW)
    row, column = np.divmod(int(cells.argmax()), cells.shape[1])
    image = Image.fromarray(picture_HWC)
    x = (column + 0.5) / cells.shape[1] * image.width
    y = (row + 0.5) / cells.shape[0] * image.height
    arm, draw = max(4, image.width // 40), ImageDraw.Draw(image)
    for colour, width in (((0, 0, 0), 4), (PEAK, 2)):
        draw.line([x - arm, y, x + arm, y], colour, width)
        draw.line([x, y - arm, x, y + arm], colour, width)
    return np.asarray(image)


def spectrum(levels_FT: ArrayLike, size: tuple[int, int]) -> Bytes:
    """Spectrogram with values in [0, 1] as a picture (width, height), low bands at the bottom."""
    image = Image.fromarray(heat(np.asarray(levels_FT)[::-1]))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def resized(picture_HWC: Bytes, size: tuple[int, int]) -> Bytes:
    """The picture at another size (width, height)."""
    return np.asarray(Image.fromarray(picture_HWC).resize(size, Image.Resampling.BICUBIC))


def data_uri(picture_HWC: Bytes, quality: int = 0) -> str:
    """The picture as `data:` address: PNG, or JPEG where a quality (1-95) is given."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture_HWC)
    if quality:
        image.save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "PNG", optimize=True)
    kind = "jpeg" if quality else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def curve(
    xs: Sequence[float], ys: Sequence[float], title: str, size: tuple[int, int] = (300, 150)
) -> str:
    """A line as inline SVG with its extremes and its last value; not-a-number is left out."""
    width, height = size
    x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    there = np.isfinite(y)
    name = f'<text class="t" x="8" y="16">{escape(title)}</text>'
    head = f'<svg class="curve" viewBox="0 0 {width} {height}" role="img">{name}'
    if there.sum() < 2:
        return f"{head}</svg>"
    low, high = float(y[there].min()), float(y[there].max())
    left, right, up, down = 46, width - 10, 30, height - 22
    px = left + scaled(x) * (right - left)
    py = down - scaled(np.where(there, y, low), low, high) * (down - up)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px[there], py[there], strict=True))
    last = y[there][-1]
    return (
        f'{head}<path class="g" d="M{left} {up}H{right}M{left} {down}H{right}"/>'
        f'<polyline class="l" points="{points}"/>'
        f'<text x="{left - 5}" y="{up + 4}" class="e">{_short(high)}</text>'
        f'<text x="{left - 5}" y="{down + 4}" class="e">{_short(low)}</text>'
        f'<text x="{left}" y="{height - 6}">{x[0]:.0f}</text>'
        f'<text x="{right}" y="{height - 6}" class="e">step {x[-1]:.0f}</text>'
        f'<text x="{right}" y="16" class="e">last {_short(last)}</text></svg>'
    )


_COLOURS = ("#2f6fde", "#d1495b", "#8d99ae", "#edae49", "#3c896d", "#7b4fa3", "#30343f", "#a9714b")


def lines(drawn: Mapping[str, Any], size: tuple[int, int] = (560, 240)) -> str:
    """`results.plot` as inline SVG with a legend; places are evenly spaced, gaps stay open.

    Values at places with names, which have no order, are points that no line joins.
    """
    width, height = size
    named = {
        name: [float("nan") if v is None else v for v in ys] for name, ys in drawn["lines"].items()
    }
    known = [v for ys in named.values() for v in ys if np.isfinite(v)] or [0.0]
    low, high = min(0.0, *known), max(1.0, *known) if max(known) > 0.5 else max(known) * 1.2
    left, right, up, down = 46, width - 170, 34, height - 26
    px = np.linspace(left, right, max(2, len(drawn["x"])))
    parts = [f'<text class="t" x="8" y="16">{escape(drawn["title"])}</text>']
    parts.append(f'<path class="g" d="M{left} {up}H{right}M{left} {down}H{right}"/>')
    for y, value in ((up + 4, high), (down + 4, low)):
        parts.append(f'<text x="{left - 5}" y="{y}" class="e">{_short(value)}</text>')
    for k in np.unique(np.linspace(0, len(drawn["x"]) - 1, 11).round().astype(int)):
        place = drawn["x"][k]
        text = _short(place) if isinstance(place, float) else escape(str(place))
        parts.append(f'<text x="{px[k]:.0f}" y="{height - 8}" text-anchor="middle">{text}</text>')
    for k, (name, ys) in enumerate(named.items()):
        colour = _COLOURS[k % len(_COLOURS)]
        py = down - scaled(np.nan_to_num(ys), low, high) * (down - up)
        there = [(a, b) for a, b, v in zip(px, py, ys, strict=False) if np.isfinite(v)]
        if not any(isinstance(x, str) for x in drawn["x"]):
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in there)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in there]
        y = up + 16 * k
        parts.append(f'<rect x="{right + 14}" y="{y - 8}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{right + 29}" y="{y + 1}">{escape(name)}</text>')
    return f'<svg class="lines" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def histogram(
    edges: Sequence[float], counts: Sequence[int], title: str, size: tuple[int, int] = (300, 150)
) -> str:
    """Bars as inline SVG with the range and the greatest count; pointing at a bar tells its own."""
    width, height = size
    left, right, up, down = 46, width - 10, 30, height - 22
    step, most = (right - left) / len(counts), max(1, *counts)
    name = f'<text class="t" x="8" y="16">{escape(title)}</text>'
    parts = [f'<svg class="curve" viewBox="0 0 {width} {height}" role="img">{name}']
    parts.append(f'<path class="g" d="M{left} {up}H{right}M{left} {down}H{right}"/>')
    for k, count in enumerate(counts):
        tall = max(1.0, count / most * (down - up)) if count else 0.0
        tip = f"{_short(edges[k])} to {_short(edges[k + 1])}: {count}"
        parts.append(
            f'<rect class="b" x="{left + k * step:.1f}" y="{down - tall:.1f}" '
            f'width="{step * 0.9:.1f}" height="{tall:.1f}"><title>{tip}</title></rect>'
        )
    parts.append(f'<text x="{left - 5}" y="{up + 4}" class="e">{most}</text>')
    parts.append(f'<text x="{left}" y="{height - 6}">{_short(edges[0])}</text>')
    parts.append(f'<text x="{right}" y="{height - 6}" class="e">{_short(edges[-1])}</text></svg>')
    return "".join(parts)


def page(title: str, parts: Sequence[str]) -> str:
    """An HTML file of some sections that needs no other file."""
    style = resources.files("mmssl.eval").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _short(value: float) -> str:
    """At most seven characters."""
    text = f"{value:.3g}"
    return text if len(text) < 7 else f"{value:.1e}"
