"""Where does the sound come from: pointing on time-space maps.

Letters in shapes: P clips, T time bins, S cells of one time step (row-major H x W), K frames.
Places are in units of the picture: (0, 0) is its upper left corner, (1, 1) its lower right one; a
box is x0, y0, x1, y1 and holds its upper left, not its lower right edge. Times are in seconds on
the clip's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


# --- boxes


def to_view(boxes_K4: ArrayLike, frame_WH: tuple[int, int], side: int) -> Floats:
    """Boxes in pixels of the stored frame -> places in the picture the model sees.

    Args:
        boxes_K4: x0, y0, x1, y1 in pixels.
        frame_WH: width and height of the stored frame.
        side: side of the model's square picture, cut from the middle after the short side was
            scaled to it; 0 = the whole frame.
    """
    boxes = np.asarray(boxes_K4, dtype=np.float64).reshape(-1, 2, 2)
    frame = np.asarray(frame_WH, dtype=np.float64)
    kept = np.full(2, frame.min()) if side else frame
    return np.asarray((boxes - (frame - kept) / 2) / kept).reshape(-1, 4)


def boxes_at(boxes_K4: Floats, fps: float, times_T: ArrayLike) -> Floats:
    """(T, 4) box of the frame nearest in time; frame k is shown at k / fps, ties go back."""
    shown_K = np.arange(len(boxes_K4)) / fps
    nearest_T = np.abs(np.asarray(times_T)[:, None] - shown_K[None]).argmin(axis=1)
    return np.asarray(boxes_K4[nearest_T])


def inside(points_P2: Floats, boxes_P4: Floats) -> Bools:
    """(P,) the point (x, y) lies in the box of its row."""
    reached = (points_P2 >= boxes_P4[..., :2]) & (points_P2 < boxes_P4[..., 2:])
    return np.asarray(reached.all(axis=-1))


# --- pointing on time-space maps


@dataclass(frozen=True)
class Pointing:
    """Where the highest cell of each map lies.

    bin_P: its time bin; cell_P: its cell. sounding_P, silent_P: its centre lies in that object's
    box alone. both_P: it lies in both boxes and counts for neither.
    """

    bin_P: Ints
    cell_P: Ints
    sounding_P: Bools
    silent_P: Bools
    both_P: Bools


def centres(cells_P: ArrayLike, height: int, width: int) -> Floats:
    """(P, 2) centres (x, y) of cells numbered row by row."""
    rows, columns = np.divmod(np.asarray(cells_P), width)
    return np.stack([(columns + 0.5) / width, (rows + 0.5) / height], axis=-1)


def point(
    maps_PTS: ArrayLike, grid_HW: tuple[int, int], sounding_PT4: Floats, silent_PT4: Floats
) -> Pointing:
    """Test the highest cell of each whole time-space map against the boxes of its time bin.

    Args:
        maps_PTS: similarity maps; of equal cells the first one counts.
        grid_HW: rows and columns of the S cells.
        sounding_PT4: box of the sounding object in the frame nearest to each bin (`boxes_at`).
        silent_PT4: the same of the silent object; not-a-number where there is none.

    Raises:
        ValueError: a map holds values that are not finite, or its cells do not fill the grid.
    """
    maps = _checked(maps_PTS, grid_HW)
    flat_P = maps.reshape(len(maps), -1).argmax(axis=1)
    bin_P, cell_P = np.divmod(flat_P, maps.shape[2])
    rows = np.arange(len(maps))
    points = centres(cell_P, *grid_HW)
    sounding_P = inside(points, sounding_PT4[rows, bin_P])
    silent_P = inside(points, silent_PT4[rows, bin_P])
    both_P = sounding_P & silent_P
    return Pointing(bin_P, cell_P, sounding_P & ~both_P, silent_P & ~both_P, both_P)


def point_frames(
    maps_PTS: ArrayLike, grid_HW: tuple[int, int], sounding_PT4: Floats, silent_PT4: Floats
) -> Bools:
    """(P, T) the highest cell of every single time bin lies in the sounding object alone."""
    maps = _checked(maps_PTS, grid_HW)
    points_PT2 = centres(maps.argmax(axis=2), *grid_HW)
    return inside(points_PT2, sounding_PT4) & ~inside(points_PT2, silent_PT4)


def _checked(maps_PTS: ArrayLike, grid_HW: tuple[int, int]) -> Floats:
    maps = np.asarray(maps_PTS, dtype=np.float64)
    if maps.shape[2] != grid_HW[0] * grid_HW[1]:
        raise ValueError(f"maps of {maps.shape[2]} cells do not fill a grid of {grid_HW}")
    if not np.isfinite(maps).all():
        raise ValueError("score maps hold values that are not finite")
    return maps


def point_centre(sounding_PT4: Floats, silent_PT4: Floats) -> Floats:
    """(P,) share of the time in which the picture's middle lies in the sounding object alone.

    The answer of a centred Gaussian, which has no opinion about time.
    """
    middle = np.full((*sounding_PT4.shape[:2], 2), 0.5)
    return np.asarray((inside(middle, sounding_PT4) & ~inside(middle, silent_PT4)).mean(axis=1))


def point_anywhere(grid_HW: tuple[int, int], sounding_PT4: Floats, silent_PT4: Floats) -> Floats:
    """(P,) chance of a hit when every cell of the map is equally likely (whole image)."""
    cells = centres(np.arange(grid_HW[0] * grid_HW[1]), *grid_HW)
    grid = np.broadcast_to(cells[:, None, None], (len(cells), *sounding_PT4.shape[:2], 2))
    alone = inside(grid, sounding_PT4[None]) & ~inside(grid, silent_PT4[None])
    return np.asarray(alone.mean(axis=(0, 2)))


def sounding_bins(waveform_S: ArrayLike, hz: float, start_s: float, times_T: ArrayLike) -> Bools:
    """(T,) time bins whose sound is within 20 dB of the loudest bin of the clip.

    Args:
        waveform_S: mono samples.
        hz: sampling rate.
        start_s: time of the first sample.
        times_T: evenly spaced centres of the bins.
    """
    times = np.asarray(times_T, dtype=np.float64)
    width = float(np.diff(times).mean()) if len(times) > 1 else 1.0
    edges_T2 = np.stack([times - width / 2, times + width / 2], axis=1)
    samples_T2 = np.rint((edges_T2 - start_s) * hz).astype(int)
    total = np.concatenate([[0.0], np.cumsum(np.asarray(waveform_S, dtype=np.float64) ** 2)])
    begin_T, end_T = np.clip(samples_T2, 0, len(total) - 1).T
    power_T = (total[end_T] - total[begin_T]) / np.maximum(end_T - begin_T, 1)
    return np.asarray((power_T > 0) & (power_T >= 0.01 * power_T.max(initial=0.0)))


def partners(
    wanted_P: Sequence[object],
    classes_N: Sequence[object],
    sources_P: Sequence[object],
    sources_N: Sequence[object],
    seed: int = 0,
) -> Ints:
    """(P,) for every clip a random one of the wanted class and another source; -1 = none."""
    rng = np.random.default_rng(seed)
    chosen = []
    for wanted, source in zip(wanted_P, sources_P, strict=True):
        fits = [
            n
            for n, (name, other) in enumerate(zip(classes_N, sources_N, strict=True))
            if name == wanted and other != source
        ]
        chosen.append(fits[int(rng.integers(len(fits)))] if fits else -1)
    return np.asarray(chosen, dtype=np.int64)
