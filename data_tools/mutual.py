"""Subsets of clips whose cluster assignments share the most information.

ACAV100M (Lee et al., ICCV 2021, `ACAV100M: Automatic Curation of Large-Scale Datasets for
Audio-Visual Video Representation Learning`): find the subset of a given size that maximises F, the
mean over pairs of an audio and a video clustering of the mutual information of the two assignments,
I = sum_ij N_ij / n log(n N_ij / (a_i b_j)), with the contingency table N of the subset, its margins
a and b, and n clips. It is filled greedily, several of a random batch at a time.

Of an empty table every clip gains the same, and a subset that begins with wrong pairs goes on to
prefer them, since any one-to-one table has the most information. The authors begin with random
clips; we begin with the table of the whole corpus, scaled down to a small share of the subset.

Letters in shapes: N clips, P pairs of clusterings, B clips of a batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Doubles = NDArray[np.float64]

_BATCH, _TAKEN = 4096, 40  # candidates, and how many of them are taken at a time


def mutual_information(ids_2PN: Ints) -> float:
    """F of all clips, nats."""
    tables = _Tables(ids_2PN)
    tables.add(np.arange(ids_2PN.shape[2]))
    return tables.value()


def pointwise(ids_2PN: Ints) -> Doubles:
    """(N,) what each clip adds to F of all: the mean over pairs of log(n N_ij / (a_i b_j))."""
    tables = _Tables(ids_2PN)
    tables.add(np.arange(ids_2PN.shape[2]))
    cells, rows, columns = (np.log(c[p]) for c, p in zip(tables.counts, tables.places, strict=True))
    return np.asarray((cells - rows - columns).mean(0) + np.log(ids_2PN.shape[2]))


def select(
    ids_2PN: Ints,
    size: int,
    seed: int = 0,
    batch: int = _BATCH,
    taken: int = _TAKEN,
    prior: float = 0.1,
) -> Ints:
    """Numbers of the chosen clips, ascending.

    Args:
        ids_2PN: cluster of each clip in the audio (0) and the video (1) clustering of each pair.
        size: clips to choose.
        seed: of the batches.
        batch: candidates of a step; all clips make it exhaustive.
        taken: clips that a step takes, those that raise F the most.
        prior: clips' worth of the corpus' table to begin with, as a share of the subset.
    """
    count = ids_2PN.shape[2]
    tables = _Tables(ids_2PN)
    tables.add(np.arange(count), prior * size / count)
    rng = np.random.default_rng(seed)
    rest, chosen = rng.permutation(count), list[int]()
    first = 0
    while len(chosen) < min(size, count):  # batches go round, so that all are drawn from alike
        places = (first + np.arange(min(batch, len(rest)))) % len(rest)
        take = min(taken, max(1, len(places) // 64), size - len(chosen))
        best = np.argsort(-tables.values_with(rest[places]), kind="stable")[:take]
        picked = rest[places[best]]
        tables.add(picked)
        chosen += picked.tolist()
        rest = np.delete(rest, places[best])
        first = (first + len(places) - take) % max(1, len(rest))
    return np.sort(np.array(chosen, np.int64))


class _Tables:
    """Contingency tables of P pairs of clusterings; occupied cells only.

    n I = sum_ij f(N_ij) - sum_i f(a_i) - sum_j f(b_j) + f(n) with f(x) = x log x.
    """

    _SIGNS = (1, -1, -1)

    def __init__(self, ids_2PN: Ints) -> None:
        self._pairs = ids_2PN.shape[1]
        self._n = self._total = 0.0
        self.places: list[Ints] = []  # (P, N) in counts, of cells, rows and columns
        self.counts: list[Doubles] = []
        width = int(ids_2PN[1].max()) + 1
        for flat_PN in (ids_2PN[0] * width + ids_2PN[1], ids_2PN[0], ids_2PN[1]):
            tagged_PN = flat_PN + np.arange(self._pairs)[:, None] * (int(flat_PN.max()) + 1)
            found, place = np.unique(tagged_PN, return_inverse=True)
            self.places.append(place.reshape(tagged_PN.shape))
            self.counts.append(np.zeros(len(found)))

    def add(self, clips_B: Ints, weight: float = 1.0) -> None:
        """Put clips into the subset."""
        for sign, places, counts in zip(self._SIGNS, self.places, self.counts, strict=True):
            touched, times = np.unique(places[:, clips_B], return_counts=True)
            before = _xlogx(counts[touched]).sum()
            counts[touched] += weight * times
            self._total += sign * (_xlogx(counts[touched]).sum() - before)
        self._n += weight * len(clips_B)

    def value(self) -> float:
        """F of the subset."""
        return float((self._total / self._pairs + _xlogx(np.float64(self._n))) / max(self._n, 1e-9))

    def values_with(self, clips_B: Ints) -> Doubles:
        """(B,) F of the subset and one of these clips."""
        total_B = np.full(len(clips_B), self._total)
        for sign, places, counts in zip(self._SIGNS, self.places, self.counts, strict=True):
            now_PB = counts[places[:, clips_B]]
            total_B += sign * (_xlogx(now_PB + 1) - _xlogx(now_PB)).sum(0)
        n = self._n + 1
        return np.asarray((total_B / self._pairs + _xlogx(np.float64(n))) / n)


def _xlogx(x: Doubles | np.float64) -> Doubles:
    return np.asarray(x * np.log(np.where(x > 0, x, 1.0)))
