"""What an audit sees in a stream of decoded frames, and whether sound and picture are in time.

Letters in shapes: H, W rows and columns (32), K pictures of a code, T frames or steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from data_tools.audit_sound import STEPS_HZ
from data_tools.near import code_of

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_SIDE, _KEEP, CODED = 32, (8, 8), 8  # cells of a side; coefficients; frames in a code
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_STILL = 2.0  # levels of 255 by which some cell must change for a frame to count as moving
_DARK, _DARK_SHARE = 0.1 * 255, 0.98  # of the cells, as in FFmpeg's blackdetect
_LAG_S, _LEAST_S = 2.0, 3.0  # longest offset that is looked for; shortest film
_LEAST_R, _LEAST_Z, _RIVAL = 0.25, 6.0, 0.75


class Pictures:
    """Takes in the frames of one stream, each shrunk to 32 x 32 cells of mean luma."""

    def __init__(self, frames: int) -> None:
        """Expect so many frames, of which 8 at even distances make the code."""
        self._chosen = {int((k + 0.5) / CODED * frames) for k in range(CODED)}
        self._reformatter = VideoReformatter()
        self._last: Floats | None = None
        self._low = np.full((_SIDE, _SIDE), np.inf, np.float32)
        self._high = -self._low
        self._coded: list[Floats] = []
        self._times: list[float] = []
        self._motion: list[float] = []
        self._still = self._dark = 0

    def add(self, frame: Any, time_s: float) -> None:
        """Take in a decoded frame that is shown at an absolute time."""
        small = self._reformatter.reformat(
            frame, _SIDE, _SIDE, "rgb24", interpolation=Interpolation.AREA, threads=1
        )
        cells_HW = small.to_ndarray().astype(np.float32) @ _LUMA
        if len(self._times) in self._chosen:
            self._coded.append(cells_HW)
        if self._last is not None:
            change_HW = np.abs(cells_HW - self._last)
            self._motion.append(float(change_HW.mean()))
            self._still += bool(change_HW.max() < _STILL)
        self._dark += bool((cells_HW < _DARK).mean() >= _DARK_SHARE)
        self._low, self._high = np.minimum(self._low, cells_HW), np.maximum(self._high, cells_HW)
        self._times.append(time_s)
        self._last = cells_HW

    @property
    def start_s(self) -> float:
        """Absolute time of the first frame."""
        return self._times[0]

    def facts(self) -> dict[str, Any]:
        """Measurements.

        frames; motion: mean absolute difference of consecutive frames, levels of 255; change: the
        most any cell changes over the clip; still_share: of the steps from frame to frame;
        black_share: of the frames; video_code: see `near.code_of`.
        """
        pairs = len(self._motion)
        found: dict[str, Any] = {
            "frames": len(self._times),
            "motion": float(np.mean(self._motion)) if pairs else 0.0,
            "change": float((self._high - self._low).max()),
            "still_share": self._still / pairs if pairs else 1.0,
            "black_share": self._dark / len(self._times),
        }
        if self._coded:  # a film of fewer frames shows its last one longer
            shown = [*self._coded, *[self._coded[-1]] * (CODED - len(self._coded))]
            found["video_code"] = code_of(np.stack(shown), _KEEP)
        return found

    def offset(self, rise_T: Floats, first_s: float) -> dict[str, float]:
        """How late the sound is; see `av_offset`."""
        times_T = np.array(self._times[1:])
        return av_offset(np.array(self._motion), times_T, rise_T, first_s)


def av_offset(
    motion_T: Doubles, times_T: Doubles, rise_T: Floats, first_s: float
) -> dict[str, Any]:
    """Seconds by which the sound is late, from the correlation of onsets with motion energy.

    Both are summed over steps as long as a frame. Empty unless one lag stands out: Pearson's r of
    at least 0.25, six robust deviations above the other lags, and no rival of three quarters of it
    (a regular rhythm has many).

    Args:
        motion_T: mean absolute difference to the frame before.
        times_T: absolute times of these frames.
        rise_T: rise of the spectrum in steps of 10 ms, the first one at `first_s`.
        first_s: absolute time.
    """
    if len(times_T) < 2 or times_T[-1] - times_T[0] < _LEAST_S:
        return {}
    step_s = float(np.median(np.diff(times_T)))
    span = round((times_T[-1] - times_T[0]) / step_s) + 1 if step_s > 0 else 0
    reach = round(_LAG_S / step_s) if span else 0
    if reach < 4 or span > 100 * len(times_T):
        return {}
    heard_s = first_s + np.arange(len(rise_T)) / STEPS_HZ
    seen = _summed(np.rint((times_T - times_T[0]) / step_s), motion_T, span)
    places = np.rint((heard_s - times_T[0]) / step_s) + reach
    heard = _summed(places, rise_T.astype(np.float64), span + 2 * reach)
    if np.ptp(seen) == 0 or np.ptp(heard) == 0:
        return {}
    r = np.array([_pearson(seen, heard[k : k + span]) for k in range(2 * reach + 1)])
    best = int(r.argmax())
    spread = 1.4826 * float(np.median(np.abs(r - np.median(r))))
    away = np.abs(np.arange(len(r)) - best) > 3
    sure = r[best] >= _LEAST_R and r[best] - np.median(r) >= _LEAST_Z * spread
    if not sure or r[away].max() > _RIVAL * r[best] or not 0 < best < len(r) - 1:
        return {}
    before, peak, after = r[best - 1 : best + 2]
    shift = 0.5 * (before - after) / (before - 2 * peak + after)
    return {"av_offset_s": float((best + shift - reach) * step_s), "av_r": float(peak)}


def _summed(places: Doubles, values: Doubles, count: int) -> Doubles:
    """Square roots, which tame single peaks, of what falls on each step."""
    inside = (places >= 0) & (places < count)
    return np.sqrt(np.bincount(places[inside].astype(int), values[inside], minlength=count))


def _pearson(a: Doubles, b: Doubles) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0
