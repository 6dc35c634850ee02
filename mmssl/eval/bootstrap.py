"""Confidence intervals by bootstrap over items, sources, speakers or folds.

Letters in shapes: N items, G groups, R resamples of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Literal["mean", "median"]

_BLOCK = 100  # resamples at a time, so that R x N weights stay small


def interval(
    values_N: ArrayLike,
    groups_N: ArrayLike | None = None,
    statistic: Statistic = "mean",
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean or a median (Efron 1979).

    The interval of a paired difference is the interval of the differences.

    Args:
        values_N: one number per item.
        groups_N: whole groups are drawn (clips cut from one source belong together); None = every
            item is its own group.
        statistic: what is computed on every resample.
        resamples: number of resamples.
        seed: of the draws; equal groups and seeds draw the same items, whatever the values.
        level: share of the resamples inside the interval.

    Returns:
        Lower and upper bound; (nan, nan) without items.

    Raises:
        ValueError: `values_N` and `groups_N` differ in length.
    """
    values = np.asarray(values_N, dtype=np.float64)
    groups = np.arange(len(values)) if groups_N is None else np.asarray(groups_N)
    if len(groups) != len(values):
        raise ValueError(f"{len(values)} values but {len(groups)} group labels")
    if len(values) == 0 or resamples == 0:
        return float("nan"), float("nan")
    compute = _means if statistic == "mean" else _medians
    draws = [compute(values, weights) for weights in _weights(groups, resamples, seed)]
    low, high = np.quantile(np.concatenate(draws), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _weights(groups_N: NDArray[np.generic], resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks (R, N): how often each item occurs in each resample."""
    names, member_N = np.unique(groups_N, return_inverse=True)
    rng = np.random.default_rng(seed)
    share = np.full(len(names), 1 / len(names))
    for begin in range(0, resamples, _BLOCK):
        counts_RG = rng.multinomial(len(names), share, size=min(_BLOCK, resamples - begin))
        yield counts_RG[:, member_N].astype(np.float64)


def _means(values_N: Floats, weights_RN: Floats) -> Floats:
    return np.asarray(weights_RN @ values_N / weights_RN.sum(axis=1))


def _medians(values_N: Floats, weights_RN: Floats) -> Floats:
    """Medians of the multisets that the integer weights describe."""
    order = np.argsort(values_N, kind="stable")
    reached_RN = np.cumsum(weights_RN[:, order], axis=1)
    half_R1 = reached_RN[:, -1:] / 2
    lower = np.argmax(reached_RN >= half_R1, axis=1)
    upper = np.argmax(reached_RN > half_R1, axis=1)
    return np.asarray((values_N[order][lower] + values_N[order][upper]) / 2)
