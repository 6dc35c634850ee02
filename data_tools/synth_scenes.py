"""What a synthetic clip looks like: shapes, backgrounds, motion, rendering.

Letters in names: T frames, H rows, W columns, C channels (RGB or RGBA), D coordinates (x, y).
Lengths are in pixels of the square frame (pixel i covers [i, i + 1]), times in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FRAME = 128
SECONDS = 4.0
MAX_OVERLAP = 0.10
SIZES = ("small", "medium", "large")
DIAMETERS = {"small": (16.0, 21.0), "medium": (23.0, 28.0), "large": (30.0, 36.0)}
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (240, 225, 50),
    "green": (45, 175, 65),
    "cyan": (50, 210, 215),
    "blue": (40, 75, 225),
    "purple": (135, 50, 185),
    "pink": (250, 130, 195),
    "white": (248, 248, 248),
    "black": (14, 14, 18),
}
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Extent = tuple[float, float]

_DRAWING = 128  # side of the high-resolution drawing of a shape
_SUPERSAMPLE = 3  # samples per pixel of the drawing and axis
_MIN_CONTRAST = 85.0  # Euclidean RGB distance (0-442) between a shape and every background pixel
_PATH_TRIES = 2_000_000  # two of the largest need 75,000 on average
_BATCH = 200  # tries at once
_BACKGROUND_TRIES = 1_000
_HITS = (3, 9)
_MIN_GAP_S = 0.18
_FIRST_S, _LAST_S = 0.1, 3.8
_SAME_BEAT_S = 0.1
_RATE_HZ = (0.6, 2.4)


# --- shapes: each tells which points of the square [-1, 1] x [-1, 1] (y grows downwards) it covers


def _polygon(
    corners: Sequence[tuple[float, float]],
) -> Callable[[Floats, Floats], Bools]:
    def inside(x: Floats, y: Floats) -> Bools:
        odd = np.zeros(x.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            crosses = (y0 > y) != (y1 > y)
            at = x0 + (y - y0) * (x1 - x0) / (y1 - y0) if y1 != y0 else x
            odd ^= crosses & (x < at)
        return odd

    return inside


def _star() -> list[tuple[float, float]]:
    angles = np.pi * np.arange(10) / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    xy_ND = np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)
    low, high = xy_ND.min(axis=0), xy_ND.max(axis=0)
    return [(float(x), float(y)) for x, y in 2 * (xy_ND - low) / (high - low) - 1]


def _heart(x: Floats, y: Floats) -> Bools:
    u, v = 1.14 * x, 0.11 - 1.115 * y  # the curve's own extent, stretched to the square
    bulge = u * u + v * v - 1
    return np.asarray(bulge * bulge * bulge <= u * u * v * v * v)


def _crescent(x: Floats, y: Floats) -> Bools:
    x = 0.75 * x - 0.25  # the moon covers [-1, 0.5] before it is stretched to the square
    return np.asarray((x * x + y * y <= 1) & ((x - 0.55) ** 2 + y * y > 0.72))


_ARROW = [(-1, -0.36), (0, -0.36), (0, -1), (1, 0), (0, 1), (0, 0.36), (-1, 0.36)]
SHAPES: dict[str, Callable[[Floats, Floats], Bools]] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": _polygon([(0, -1), (1, 1), (-1, 1)]),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) <= 0.3,
    "star": _polygon(_star()),
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.36),
    "crescent": _crescent,
    "arrow": _polygon(_ARROW),
    "heart": _heart,
}


def draw_shape(name: str, rgb: Floats) -> Floats:
    """Draw a shape that fills its square.

    Args:
        name: One of ``SHAPES``.
        rgb: Colour (3,), 0-255.

    Returns:
        Premultiplied RGBA drawing (128, 128, 4): colour 0-255 times coverage, coverage 0-1.
    """
    count = _DRAWING * _SUPERSAMPLE
    axis = (np.arange(count) + 0.5) * 2 / count - 1
    inside = SHAPES[name](*np.meshgrid(axis, axis))
    cells = inside.reshape(_DRAWING, _SUPERSAMPLE, _DRAWING, _SUPERSAMPLE)
    cover_HW = cells.mean(axis=(1, 3))
    return np.concatenate([cover_HW[..., None] * rgb, cover_HW[..., None]], axis=-1)


# --- backgrounds


def _smooth_noise(rng: np.random.Generator, cells: int) -> Floats:
    """Value noise in [-1, 1], (128, 128): a random grid, linearly interpolated."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1))
    at = np.linspace(0, cells, FRAME, endpoint=False)
    low, part = at.astype(int), at - at.astype(int)
    rows = grid[low] * (1 - part)[:, None] + grid[low + 1] * part[:, None]
    return np.asarray(rows[:, low] * (1 - part) + rows[:, low + 1] * part)


def _hsv(hue: float, saturation: float, value: float) -> Floats:
    """RGB 0-255 of a colour, (3,)."""
    wheel = np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return np.asarray(255 * value * (1 - saturation * (1 - np.clip(wheel, 0, 1))))


def _one_background(rng: np.random.Generator) -> Floats:
    first = _hsv(rng.uniform(), rng.uniform(0.1, 0.6), rng.uniform(0.15, 0.95))
    second = np.clip(first + rng.uniform(-60, 60, 3), 0, 255)
    y_HW, x_HW = np.mgrid[0:FRAME, 0:FRAME] / (FRAME - 1)
    kind = int(rng.integers(4))
    if kind == 0:
        mix = np.zeros((FRAME, FRAME))
    elif kind == 1:
        angle = rng.uniform(0, 2 * np.pi)
        mix = np.cos(angle) * (x_HW - 0.5) + np.sin(angle) * (y_HW - 0.5) + 0.5
    elif kind == 2:
        mix = np.hypot(x_HW - rng.uniform(), y_HW - rng.uniform())
    else:
        mix = 0.5 + 0.5 * _smooth_noise(rng, int(rng.integers(4, 12)))
    grain = rng.normal(0, rng.uniform(0, 3), (FRAME, FRAME, 1))
    blend = np.clip(mix, 0, 1)[..., None]
    return np.clip(first * (1 - blend) + second * blend + grain, 0, 255)


def background(rng: np.random.Generator, avoid: Sequence[Floats] = ()) -> Floats:
    """A background on which every colour of ``avoid`` stands out.

    Args:
        rng: Source of all choices.
        avoid: Colours (3,), 0-255, of what will be drawn on it.

    Returns:
        RGB picture (128, 128, 3), 0-255.

    Raises:
        RuntimeError: If no background with enough contrast is found.
    """
    for _ in range(_BACKGROUND_TRIES):
        picture_HWC = _one_background(rng)
        probe = picture_HWC[::8, ::8].reshape(-1, 3)
        if all(np.linalg.norm(probe - rgb, axis=1).min() >= _MIN_CONTRAST for rgb in avoid):
            return picture_HWC
    raise RuntimeError(f"no background contrasts with {[c.tolist() for c in avoid]}")


# --- motion


def fold(unfolded: Floats, span: float) -> Floats:
    """Positions in [0, span] of objects that bounce, from those they would have without walls."""
    return np.asarray(span - np.abs(unfolded % (2 * span) - span))


@dataclass(frozen=True)
class Path:
    """Motion of one object along straight lines between the walls.

    Attributes:
        size: Side (px) of the object's square box; for an object that changes size, the largest.
        start: Left upper corner (2,) of the box at time 0, px.
        speed: Velocity (2,), px/s.
    """

    size: float
    start: tuple[float, float]
    speed: tuple[float, float]

    def centres(self, times_T: Floats) -> Floats:
        """Centres (T, 2) in px at the given times (T,) in seconds."""
        span = FRAME - self.size
        unfolded_TD = np.asarray(self.start) + times_T[:, None] * np.asarray(self.speed)
        return fold(unfolded_TD, span) + self.size / 2

    def hits(self) -> list[float]:
        """Times (s) in the clip at which the box touches a wall, ascending."""
        span = FRAME - self.size
        times: list[float] = []
        for start, speed in zip(self.start, self.speed, strict=True):
            first = (span - start if speed > 0 else start) / abs(speed)
            times.extend(np.arange(first, SECONDS, span / abs(speed)).tolist())
        return sorted(times)


def _good_hits(hits: Sequence[float]) -> bool:
    if not _HITS[0] <= len(hits) <= _HITS[1] or hits[0] < _FIRST_S or hits[-1] > _LAST_S:
        return False
    return bool(np.diff(hits).min() >= _MIN_GAP_S)


def boxes(centres_TD: Floats, sizes_T: Floats, extent: Extent = (1.0, 1.0)) -> Floats:
    """Boxes (T, 4) as x0, y0, x1, y1 in px; sides are size times extent."""
    half_TD = sizes_T[:, None] * np.asarray(extent) / 2
    return np.concatenate([centres_TD - half_TD, centres_TD + half_TD], axis=1)


def same_beat(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest share of one object's hits that fall within 0.1 s of a hit of the other."""
    near_AB = np.abs(np.subtract.outer(np.asarray(a), np.asarray(b))) < _SAME_BEAT_S
    return float(max(near_AB.any(axis=1).mean(), near_AB.any(axis=0).mean()))


def sample_paths(
    rng: np.random.Generator,
    sizes: Sequence[float],
    times_T: Floats,
    extents: Sequence[Extent] = ((1.0, 1.0), (1.0, 1.0)),
) -> list[Path]:
    """Draw the path of one object, or of two that keep apart and differ in rhythm.

    Each has 3 to 9 wall hits that can be told apart. Two are redrawn together until they fit, so
    that neither is special.

    Args:
        rng: Source of the paths.
        sizes: Box sides (px), one or two.
        times_T: Frame times (s) at which boxes may share at most a tenth of the smaller one.
        extents: Width and height of what is seen, relative to its square.

    Raises:
        RuntimeError: If none are found in a bounded number of tries.
    """
    for _ in range(_PATH_TRIES // _BATCH):
        candidates = [_candidates(rng, size) for size in sizes]
        apart_N = np.ones(_BATCH, dtype=bool)
        if len(sizes) == 2:
            apart_N = _apart(candidates, sizes, extents, times_T)
        for k in np.flatnonzero(apart_N):
            paths = [
                Path(size, (float(x), float(y)), (float(u), float(v)))
                for size, ((x, y), (u, v)) in zip(sizes, (c[k] for c in candidates), strict=True)
            ]
            if _good_rhythms([path.hits() for path in paths]):
                return paths
    raise RuntimeError(f"no paths without overlap for boxes of {list(sizes)} px")


def _candidates(rng: np.random.Generator, size: float) -> Floats:
    """Start (px) and velocity (px/s) of random paths, (N, 2, D)."""
    span = FRAME - size
    rate_N, share_N = rng.uniform(*_RATE_HZ, _BATCH), rng.uniform(0.15, 0.85, _BATCH)
    signs_ND = rng.choice([-1.0, 1.0], (_BATCH, 2))
    speed_ND = signs_ND * (rate_N * span)[:, None] * np.stack([share_N, 1 - share_N], axis=1)
    return np.stack([rng.uniform(0, span, (_BATCH, 2)), speed_ND], axis=1)


def _apart(
    candidates: Sequence[Floats],
    sizes: Sequence[float],
    extents: Sequence[Extent],
    times_T: Floats,
) -> Bools:
    """Which pairs of candidates (N,) share at most a tenth of the smaller box at all times."""
    centres = [
        fold(c[:, 0, None] + times_T[:, None] * c[:, 1, None], FRAME - size) + size / 2
        for c, size in zip(candidates, sizes, strict=True)
    ]
    sides = [size * np.asarray(extent) for size, extent in zip(sizes, extents, strict=True)]
    gap_NTD = np.abs(centres[0] - centres[1])
    shared_NTD = np.clip((sides[0] + sides[1]) / 2 - gap_NTD, 0, np.minimum(*sides))
    allowed = MAX_OVERLAP * min(side.prod() for side in sides)
    return np.asarray((shared_NTD.prod(axis=2) <= allowed).all(axis=1))


def _good_rhythms(hits: Sequence[Sequence[float]]) -> bool:
    if not all(_good_hits(times) for times in hits):
        return False
    return len(hits) == 1 or same_beat(hits[0], hits[1]) <= 0.5


# --- rendering


class Stamp:
    """A drawing that can be placed at any size and sub-pixel position, exactly area-averaged.

    Args:
        drawing_HWC: Premultiplied RGBA (side, side, 4), see ``draw_shape``.
        extent: Width and height of what is seen, relative to the side.
    """

    def __init__(self, drawing_HWC: Floats, extent: Extent = (1.0, 1.0)) -> None:
        self.extent = extent
        self.side = drawing_HWC.shape[0]
        padded = np.pad(drawing_HWC, ((1, 0), (1, 0), (0, 0)))
        self.integral = padded.cumsum(axis=0).cumsum(axis=1)

    def place(self, frame_HWC: Floats, box: Floats) -> None:
        """Draw into ``frame_HWC`` (128, 128, 3) in place; ``box`` (4,) is the square, in px."""
        low = np.floor(box[:2]).astype(int)
        high = np.ceil(box[2:]).astype(int)
        low, high = np.maximum(low, 0), np.minimum(high, FRAME)
        scale = self.side / (box[2] - box[0])
        edges = [
            np.clip((np.arange(low[d], high[d] + 1) - box[d]) * scale, 0, self.side)
            for d in range(2)
        ]
        rows = _between(self.integral, edges[1])
        sums = _between(rows.swapaxes(0, 1), edges[0]).swapaxes(0, 1)
        patch = np.diff(np.diff(sums, axis=0), axis=1) / scale**2
        view = frame_HWC[low[1] : high[1], low[0] : high[0]]
        view *= 1 - np.clip(patch[..., 3:], 0, 1)
        view += patch[..., :3]


def _between(table: Floats, at: Floats) -> Floats:
    """Rows of ``table`` at fractional indices ``at``, linearly interpolated."""
    low = np.minimum(at.astype(int), len(table) - 2)
    part = (at - low)[:, None, None]
    return np.asarray(table[low] * (1 - part) + table[low + 1] * part)


def render(picture_HWC: Floats, actors: Sequence[tuple[Stamp, Floats]]) -> NDArray[np.uint8]:
    """Draw actors, each a stamp and its square boxes (T, 4) in px, the last in front.

    Returns:
        Frames (T, 128, 128, 3).
    """
    frames = np.empty((len(actors[0][1]), FRAME, FRAME, 3), dtype=np.uint8)
    for t in range(len(frames)):
        canvas = picture_HWC.copy()
        for stamp, boxes_T4 in actors:
            stamp.place(canvas, boxes_T4[t])
        frames[t] = np.rint(np.clip(canvas, 0, 255))
    return frames
