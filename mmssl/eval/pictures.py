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

from mmssl.eval.results import bounds_of

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


_LEFT, _RIGHT, _UP, _DOWN = 46, 390, 34, 214  # frame of a plot in its picture, 560 wide
_LETTER = 6.2  # width of one


def lines(drawn: Mapping[str, Any]) -> str:
    """`results.plot` as inline SVG with a legend; places are evenly spaced, gaps stay open.

    Values at places with names, which have no order, are points that no line joins, side by side.
    Intervals are whiskers.
    """
    names = any(isinstance(x, str) for x in drawn["x"])
    count, many = len(drawn["x"]), len(drawn["lines"])
    step = (_RIGHT - _LEFT) / max(1, count if names else count - 1)
    px: Floats = np.arange(count, dtype=np.float64) * step + (_LEFT + (step / 2 if names else 0.0))
    values = {name: _with_bounds(drawn, name) for name in drawn["lines"]}
    known = np.concatenate([x[np.isfinite(x)] for x in values.values()] + [np.zeros(1)])
    low, high = known.min(), max(1.0, known.max()) if known.max() > 0.5 else known.max() * 1.2
    places, height = _places(drawn["x"], px, step, names)
    parts = [f'<text class="t" x="8" y="16">{escape(drawn["title"])}</text>', *places]
    for share in np.linspace(0, 1, 5):
        y = _DOWN - share * (_DOWN - _UP)
        parts.append(f'<path class="g" d="M{_LEFT} {y:.0f}H{_RIGHT}"/>')
        level = _short(low + share * (high - low))
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.0f}" class="e">{level}</text>')
    for k, (name, values_T3) in enumerate(values.items()):
        colour = _COLOURS[k % len(_COLOURS)]
        at: Floats = px + (0.7 * step * ((k + 0.5) / many - 0.5) if names else 0.0)
        there = np.isfinite(values_T3[:, 0])
        py_T3 = _DOWN - scaled(values_T3[there], low, high) * (_DOWN - _UP)
        parts += _marks(at[there], py_T3, colour, not names)
        y = _UP + 16 * k
        parts.append(
            f'<rect x="{_RIGHT + 14}" y="{y - 8}" width="10" height="10" fill="{colour}"/>'
        )
        parts.append(f'<text x="{_RIGHT + 29}" y="{y + 1}">{escape(name)}</text>')
    return f'<svg class="lines" viewBox="0 0 560 {height:.0f}" role="img">{"".join(parts)}</svg>'


def _with_bounds(drawn: Mapping[str, Any], name: str) -> Floats:
    """(places, 3) value of a line, lower and upper bound; the value itself where there are none."""
    ys = [np.nan if y is None else y for y in drawn["lines"][name]]
    pairs = zip(ys, bounds_of(drawn, name), strict=True)
    return np.asarray([(y, *(pair or (y, y))) for y, pair in pairs])


def _marks(px: Floats, py_T3: Floats, colour: str, joined: bool) -> list[str]:
    """Points and whiskers, and the line that joins the points."""
    points = list(zip(px, *py_T3.T, strict=True))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in points)
    style = f'fill="none" stroke="{colour}"'
    return [
        *([f'<polyline points="{path}" {style} stroke-width="2"/>'] if joined else []),
        *(f'<path d="M{x:.1f} {a:.1f}V{b:.1f}" {style}/>' for x, _, a, b in points if a != b),
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y, *_ in points),
    ]


def _places(x: Sequence[Any], px: Floats, step: float, every: bool) -> tuple[list[str], float]:
    """What stands below the axis, slanted where names would run into each other; whole height."""
    texts = [_short(v) if isinstance(v, float) else str(v) for v in x]
    longest = _LETTER * max(len(text) for text in texts)
    if every and longest > step:
        style, drop = 'class="e" transform="rotate(-40 {0:.0f} {1})"', 12
        height = _DOWN + drop + 0.64 * longest + 8  # sine of 40 degrees
    else:
        style, drop, height = 'text-anchor="middle"', 18, _DOWN + 26.0
    apart = 1 if every else -int(-max(longest + 6, 1) // max(step, 1))
    shown = [
        f'<text x="{at:.0f}" y="{_DOWN + drop}" {style.format(at, _DOWN + drop)}>'
        f"{escape(text)}</text>"
        for at, text in list(zip(px, texts, strict=True))[::apart]
    ]
    return shown, height


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
