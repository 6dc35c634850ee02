"""How well discrete units match the classes of the same frames.

From joint counts of classes (phones, digits ...) and units: PNMI, purities (Hsu et al. 2021,
HuBERT, section IV-C) and how evenly the units are used. Counts of several files add up.

Letters in shapes: Y classes, Z units, N frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmssl.data.sidecars import SideCar
from mmssl.types import UserError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class UnitQuality:
    """Agreement of units with classes; all shares in [0, 1], entropies in nats.

    pnmi: 1 - H(class | unit) / H(class), the share of what is to be known of a frame's class that
    its unit tells. phone_purity: accuracy of naming each unit after its most frequent class.
    cluster_purity: the same with the roles exchanged; it falls as units grow in number. entropy,
    perplexity: of the use of units. used: units that occur. bias: PNMI to be expected of
    independent labels of that size.
    """

    pnmi: float
    phone_purity: float
    cluster_purity: float
    entropy: float
    perplexity: float
    used: int
    units: int
    frames: int
    bias: float


def joint_counts(classes_N: ArrayLike, units_N: ArrayLike, classes: int, units: int) -> Ints:
    """(Y, Z) how often class and unit meet; frames in which either is negative are left out.

    Raises:
        ValueError: other lengths, or numbers beyond `classes` and `units`.
    """
    y_N, z_N = np.asarray(classes_N, np.int64), np.asarray(units_N, np.int64)
    if y_N.shape != z_N.shape or y_N.ndim != 1:
        raise ValueError(f"classes of shape {y_N.shape}, units of shape {z_N.shape}")
    known = (y_N >= 0) & (z_N >= 0)
    y_N, z_N = y_N[known], z_N[known]
    if y_N.size and (y_N.max() >= classes or z_N.max() >= units):
        raise ValueError(
            f"class {y_N.max()} of {classes} or unit {z_N.max()} of {units}: out of range"
        )
    return np.bincount(y_N * units + z_N, minlength=classes * units).reshape(classes, units)


def sample_counts(
    car: SideCar, class_of: Mapping[str, int], classes: int, codebook: int = 0
) -> Ints:
    """(Y, Z) counts where every frame of a sample has the sample's class; others are left out.

    Raises:
        UserError: no labelled sample has a class.
    """
    units = car.info.classes[codebook]
    counts_YZ = np.zeros((classes, units), np.int64)
    for key, number in class_of.items():
        if key in car:
            counts_YZ[number] += np.bincount(car.ids(key)[:, codebook], minlength=units)
    if not counts_YZ.any():
        raise UserError(f"{car.path}: none of its samples has a class; give classes by sample key")
    return counts_YZ


def unit_quality(counts_YZ: Ints) -> UnitQuality:
    """Quality from joint counts.

    Raises:
        UserError: no frame, or all of one class: there is nothing to tell apart.
    """
    frames = int(counts_YZ.sum())
    by_class_Y, by_unit_Z = counts_YZ.sum(1), counts_YZ.sum(0)
    if int((by_class_Y > 0).sum()) < 2:
        raise UserError(
            f"unit quality: {frames} frames of {int((by_class_Y > 0).sum())} classes; at least two "
            "classes are needed"
        )
    entropy = _entropy(by_unit_Z)
    known = _entropy(by_class_Y)
    told = known + entropy - _entropy(counts_YZ.ravel())
    return UnitQuality(
        pnmi=max(0.0, told) / known,
        phone_purity=float(counts_YZ.max(0).sum()) / frames,
        cluster_purity=float(counts_YZ.max(1).sum()) / frames,
        entropy=entropy,
        perplexity=float(np.exp(entropy)),
        used=int((by_unit_Z > 0).sum()),
        units=counts_YZ.shape[1],
        frames=frames,
        bias=pnmi_bias(int((by_class_Y > 0).sum()), int((by_unit_Z > 0).sum()), frames),
    )


def pnmi_bias(classes: int, units: int, frames: int) -> float:
    """PNMI that independent labels show on average: (Y - 1)(Z - 1) / (2 N ln Y), Miller's bias of
    mutual information (1955), over the entropy of even classes.
    """
    return (classes - 1) * (units - 1) / (2 * frames * float(np.log(classes)))


def _entropy(counts: Ints) -> float:
    """In nats."""
    share: Floats = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
