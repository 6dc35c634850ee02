"""Near duplicates: small codes of content that survive re-encoding, and the search for equal ones.

A code holds the low-frequency coefficients of a discrete cosine transform, as a perceptual hash
does (Zauner 2010, `Implementation and Benchmarking of Perceptual Image Hash Functions`), but with
eight bits for each: the sign alone, which such a hash keeps, is noise where a coefficient is near
zero, as most are for smooth pictures and steady sounds. The constant part is left out, and codes
are compared by their angle: brightness, contrast and gain do not matter.

Letters in shapes: K pictures of a code, H rows, W columns, N codes, D numbers of a code.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_FLAT = 2.0  # a picture whose coefficients are all below (in levels or dB) shows nothing
_EXACT = 4096  # codes that are compared all with all
_NEIGHBOURS = 16
_PROBES = 4  # of the sqrt(N) lists of an inverted file are searched
_ROWS = 8192  # worked on together


def code_of(pictures_KHW: Floats, keep: tuple[int, int]) -> str:
    """The lowest coefficients of each picture by row and column, constant parts aside, as text.

    Empty where no picture differs from a plain one.
    """
    rows, columns = (_cosines(k, n) for k, n in zip(keep, pictures_KHW.shape[1:], strict=True))
    part_KHW = np.einsum("ah,khw,bw->kab", rows, pictures_KHW, columns)
    part_KHW[:, 0, 0] = 0.0
    size = math.sqrt(pictures_KHW.shape[1] * pictures_KHW.shape[2])
    # the norm of a picture's coefficients, per cell, is its standard deviation
    if np.linalg.norm(part_KHW, axis=(1, 2)).max() < _FLAT * size:
        return ""
    scaled = np.rint(127 * part_KHW / np.abs(part_KHW).max()).astype(np.int8)
    return base64.b85encode(scaled.tobytes()).decode()


def _cosines(keep: int, count: int) -> Floats:
    """The first rows of the orthonormal transform."""
    grid = np.outer(np.arange(keep), np.arange(count) + 0.5) * (math.pi / count)
    scale_K1 = np.where(np.arange(keep) == 0, 1.0, math.sqrt(2))[:, None] / math.sqrt(count)
    return np.asarray(np.cos(grid) * scale_K1, np.float32)


def near_pairs(codes: Sequence[str], least: float) -> list[tuple[int, int]]:
    """Pairs (i < j) of codes whose cosine reaches `least`, at most 15 for each code.

    Of equal codes each is joined to the one before. Above 4096 different ones the neighbours are
    looked for in the inverted file of faiss, which compares a code with about 4 sqrt(N) others.
    """
    last: dict[str, int] = {}
    pairs, firsts = [], []
    for i, code in enumerate(codes):
        if code in last:
            pairs.append((last[code], i))
        else:
            firsts.append(i)
        last[code] = i
    kept = np.array(firsts, np.int64)
    if len(kept) < 2:
        return pairs
    rows_ND = np.stack([_bytes(codes[i]) for i in kept])
    index = _index(rows_ND)
    for start in range(0, len(kept), _ROWS):
        x_ND = unit(rows_ND[start : start + _ROWS])
        cosines, ids = index.search(x_ND, min(_NEIGHBOURS, len(kept)))
        for row, place in zip(*np.nonzero((cosines >= least) & (ids >= 0)), strict=True):
            a, b = sorted((int(kept[start + row]), int(kept[ids[row, place]])))
            pairs += [(a, b)] if a < b else []
    return sorted(set(pairs))


def _bytes(code: str) -> NDArray[np.int8]:
    return np.frombuffer(base64.b85decode(code), np.int8)


def cosine(code: str, other: str) -> float:
    """Of two codes of one length."""
    a_D, b_D = unit(np.stack([_bytes(code), _bytes(other)]))
    return float(a_D @ b_D)


def unit(rows_ND: NDArray[np.int8]) -> Floats:
    """Rows of length one."""
    x_ND = rows_ND.astype(np.float32)
    return np.asarray(x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True))


def _index(rows_ND: NDArray[np.int8]) -> Any:
    """An index that holds the rows; exact where they are few."""
    count, width = rows_ND.shape
    index: Any = faiss.IndexFlatIP(width)
    if count > _EXACT:
        lists, half = round(math.sqrt(count)), faiss.ScalarQuantizer.QT_fp16
        metric = faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexIVFScalarQuantizer(index, width, lists, half, metric, False)
        index.cp.seed, index.cp.max_points_per_centroid, index.nprobe = 0, 64, _PROBES
        index.train(unit(rows_ND[:: max(1, count // (64 * lists))]))
    for start in range(0, count, _ROWS):
        index.add(unit(rows_ND[start : start + _ROWS]))
    return index


def groups(count: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Connected components of more than one of 0..count-1, each ascending."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    members: dict[int, list[int]] = {}
    for i in sorted({i for pair in pairs for i in pair}):
        members.setdefault(root(i), []).append(i)
    return list(members.values())
