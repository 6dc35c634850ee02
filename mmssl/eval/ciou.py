"""Consensus IoU and the pointing game on still maps (VGG-SS, Flickr-SoundNet).

Letters in shapes: P pictures, H rows, W columns, K boxes. Places are in units of the picture, as in
`localize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SIDE = 224  # side of the maps and weight maps of the published protocols
SUCCESS = np.linspace(0, 1, 21)  # cIoU levels of the area under the success curve
LEVELS = np.linspace(0.05, 0.95, 19)  # map levels of the curve of the absolute rule


def weight_map(boxes_K4: ArrayLike, consensus: int = 1, side: int = SIDE) -> Floats:
    """Ground truth (side, side): filled boxes summed, divided by `consensus`, clipped to 1.

    Box corners are scaled and cut to whole pixels, as in the released tools. `consensus=1` is the
    union of the boxes (VGG-SS), `consensus=2` the agreement of two annotators (Flickr-SoundNet).
    """
    total = np.zeros((side, side))
    for x0, y0, x1, y1 in (np.asarray(boxes_K4, dtype=np.float64) * side).astype(int):
        total[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] += 1
    return np.asarray(np.minimum(total / consensus, 1.0))


def upsample(map_HW: ArrayLike, side: int = SIDE, align_corners: bool = True) -> Floats:
    """Bilinear (side, side); published protocols align corners, `False` keeps cells in place."""
    cells = torch.as_tensor(np.asarray(map_HW, dtype=np.float64))[None, None]
    size = (side, side)
    picture = torch.nn.functional.interpolate(
        cells, size, mode="bilinear", align_corners=align_corners
    )
    return np.asarray(picture[0, 0].numpy())


def predict_relative(picture_HW: Floats) -> Bools:
    """Pixels at or above the median: the upper half, the historic rule."""
    return np.asarray(picture_HW >= np.median(picture_HW))


def predict_absolute(picture_HW: Floats, level: float = 0.5) -> Bools:
    """Pixels at or above `level` once the map is scaled to [0, 1]; none of a constant map."""
    low, high = picture_HW.min(), picture_HW.max()
    if high == low:
        return np.zeros(picture_HW.shape, dtype=bool)
    return np.asarray((picture_HW - low) / (high - low) >= level)


def predict_adaptive(picture_HW: Floats, weights_HW: Floats) -> Bools:
    """As many of the highest pixels as the ground truth covers (more where they tie)."""
    count = int((weights_HW > 0).sum())
    if count == 0:
        return np.zeros(picture_HW.shape, dtype=bool)
    level = np.partition(picture_HW.ravel(), -count)[-count]
    return np.asarray(picture_HW >= level)


def ciou(predicted_HW: Bools, weights_HW: Floats) -> float:
    """Consensus IoU: sum of g over A / (sum of g + pixels of A where g = 0)  (Senocak et al. 2018).

    Raises:
        ValueError: the ground truth is empty.
    """
    if not weights_HW.any():
        raise ValueError("the ground truth of this picture is empty: leave it out and count it")
    missed = (predicted_HW & (weights_HW == 0)).sum()
    return float(weights_HW[predicted_HW].sum() / (weights_HW.sum() + missed))


def success_rate(values_P: ArrayLike, level: float = 0.5) -> float:
    """Share of pictures with cIoU at or above the level ("cIoU@0.5", AP50)."""
    return float((np.asarray(values_P) >= level).mean())


def success_area(values_P: ArrayLike) -> float:
    """Trapezoid area under the success rate over the levels 0, 0.05 ... 1 ("AUC")."""
    rates = [success_rate(values_P, level) for level in SUCCESS]
    return float(np.trapezoid(rates, SUCCESS))


def rates(values_P: ArrayLike) -> dict[str, float]:
    """Mean cIoU, share at or above 0.5, and area under the success curve."""
    mean = float(np.mean(np.asarray(values_P)))
    return {"mean": mean, "at_0.5": success_rate(values_P), "auc": success_area(values_P)}


def ciou_values(pictures_PHW: Sequence[Floats], weights_PHW: Sequence[Floats]) -> dict[str, Floats]:
    """(P,) cIoU of every picture by each of the three rules."""
    pairs = list(zip(pictures_PHW, weights_PHW, strict=True))
    return {
        "relative": np.asarray([ciou(predict_relative(h), g) for h, g in pairs]),
        "absolute": np.asarray([ciou(predict_absolute(h), g) for h, g in pairs]),
        "adaptive": np.asarray([ciou(predict_adaptive(h, g), g) for h, g in pairs]),
    }


def ciou_summary(pictures_PHW: Sequence[Floats], weights_PHW: Sequence[Floats]) -> dict[str, Any]:
    """CIoU by the three rules (mean, share >= 0.5, area) and the absolute rule at 19 map levels."""
    values = ciou_values(pictures_PHW, weights_PHW)
    result: dict[str, Any] = {rule: rates(column) for rule, column in values.items()}
    pairs = list(zip(pictures_PHW, weights_PHW, strict=True))
    result["curve"] = {
        "level": [round(float(level), 2) for level in LEVELS],
        "at_0.5": [
            success_rate([ciou(predict_absolute(h, level), g) for h, g in pairs])
            for level in LEVELS
        ],
    }
    return result


def centre_map(side: int = SIDE) -> Floats:
    """Gaussian around the middle of the picture, standard deviation a quarter of the side."""
    axis = (np.arange(side) + 0.5) / side - 0.5
    return np.asarray(np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 0.25**2)))


def pointing_game(picture_HW: Floats, weights_HW: Floats, tolerance: float = 0.0) -> bool:
    """The highest pixel lies in the ground truth, or within `tolerance` pixels of it."""
    row, column = np.divmod(int(picture_HW.argmax()), picture_HW.shape[1])
    rows, columns = np.nonzero(weights_HW > 0)
    if len(rows) == 0:
        return False
    return bool(np.hypot(rows - row, columns - column).min() <= tolerance)


def spectral_residual(frame_HWC: NDArray[np.uint8], side: int = 64) -> Floats:
    """(side, side) saliency of a picture alone: what is unusual in its spectrum (Hou, Zhang 2007).

    The logarithm of the amplitudes minus its local mean, with the phases, back to a picture,
    squared and blurred.
    """
    from torchvision.transforms.functional import gaussian_blur

    grey = torch.from_numpy(frame_HWC).double().mean(-1)[None, None]
    small = torch.nn.functional.interpolate(grey, (side, side), mode="area")
    spectrum = torch.fft.fft2(small)
    log = (spectrum.abs() + 1e-8).log()
    around = torch.nn.functional.pad(log, (1, 1, 1, 1), mode="circular")
    residual = log - torch.nn.functional.avg_pool2d(around, 3, stride=1)
    energy = torch.fft.ifft2(torch.polar(residual.exp(), spectrum.angle())).abs().square()
    return np.asarray(gaussian_blur(energy, [9, 9], [2.5, 2.5])[0, 0].numpy())
