"""k-means over a stream of frame features, in memory that the arguments bound.

A first pass keeps a uniform sample of the frames; k-means++ (Arthur and Vassilvitskii 2007) and a
few iterations on the sample give the start, the best of several. Then every sweep reads the whole
stream once (the sample, where that holds all of it) and makes one exact iteration of Lloyd's
algorithm from running sums, so that the mean squared distance never rises and does not depend on a
batch size or a learning rate. Several clusterings share the passes.

Memory: the sample (points x D fp32, twice while it is seeded), sums of all clusters of all
clusterings (K x D fp64), and what the stream hands over at a time. faiss finds the nearest centres.

Letters in shapes: N frames of one piece of the stream, K clusters, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmssl.data.sidecars import Source
from mmssl.files import whole_file
from mmssl.rng import numpy_generator
from mmssl.types import UserError

VERSION = "mmssl-clusters-1"
_META = "mmssl"  # the entry of the header
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Stream = Callable[[], Iterable[Floats]]

_ROWS = 8192  # frames worked on together
_FAR = 256  # far frames remembered for clusters that lost theirs
_START_SWEEPS = 10  # iterations on the sample
_SAME = 1e-6  # squared distances below this share of the squared norms are rounding errors


@dataclass(frozen=True)
class Clusters:
    """Centres of a clustering, and what they were fitted to.

    centres_KD: fp32. source: what the features come from. inertia: mean squared distance of the
    frames to the nearest centre, at the start of every sweep over the stream.
    """

    centres_KD: Floats
    source: Source
    inertia: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """Number of clusters."""
        return len(self.centres_KD)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the centres."""
        return hashlib.sha256(self.centres_KD.astype("<f4").tobytes()).hexdigest()

    @cached_property
    def _search(self) -> _Search:
        return _Search(self.centres_KD)

    def assign(self, features_ND: Floats) -> Ints:
        """(N,) nearest cluster of each frame; the lower id on a tie.

        Raises:
            UserError: features of another width, or some that are not finite.
        """
        _check(features_ND, self.centres_KD.shape[1])
        return self._search(features_ND)[1]

    def describe(self) -> str:
        """What a user wants to know of it."""
        inertia = ", ".join(f"{value:.6g}" for value in self.inertia)
        return f"{self.count} clusters, mean squared distance {inertia}"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose header says what the centres belong to."""
        facts = {
            "format": VERSION,
            "source": asdict(self.source),
            "inertia": self.inertia,
            "clusters": self.count,
        }
        # one entry: safetensors writes several in an order that changes from process to process
        meta = {_META: json.dumps(facts, sort_keys=True)}
        with whole_file(Path(path)) as partial:
            partial.write_bytes(save({"centres": self.centres_KD}, meta))

    @classmethod
    def load(cls, path: str | Path) -> Clusters:
        """Read a file of `save`.

        Raises:
            UserError: no such file, or another kind or version of file.
        """
        if not Path(path).is_file():
            raise UserError(f"{path}: no such clustering; make one with data_tools.label_shards")
        try:
            with safe_open(path, "np") as file:
                facts = json.loads((file.metadata() or {}).get(_META, "{}"))
                version = facts.get("format")
                if version == VERSION:
                    centres_KD = file.get_tensor("centres")
                    return cls(centres_KD, Source(**facts["source"]), tuple(facts["inertia"]))
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a clustering, or a damaged one ({error!r})") from error
        raise UserError(
            f"{path}: the format is {version!r}, this version reads {VERSION!r}; cluster again "
            "with data_tools.label_shards"
        )


def fit(stream: Stream, clusters: int, source: Source, **options: Any) -> Clusters:
    """One clustering of K clusters; see `fit_together`."""
    return fit_together(stream, [clusters], source, **options)[0]


def fit_together(
    stream: Stream,
    sizes: Sequence[int],
    source: Source,
    sweeps: int = 5,
    points: int = 100_000,
    restarts: int = 3,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> list[Clusters]:
    """Cluster what `stream` yields into several numbers of clusters, in the same passes.

    Each is what it would be alone. A stream of at most `points` frames is read once.

    Args:
        stream: called for the sample and, unless that holds all, for every sweep; must yield the
            same (N, D) pieces in the same order each time. A piece is dropped before the next is
            asked for.
        sizes: K of each clustering.
        source: what the features come from; kept with the centres.
        sweeps: passes over the stream after the start, at most; 0 keeps the start.
        points: frames of the sample, which bounds the memory.
        restarts: starts tried on the sample.
        seed: decides sample and starts.
        tolerance: stop when a sweep lowers the mean squared distance by a smaller share.

    Raises:
        UserError: fewer different frames than clusters, frames that are not finite or differ in
            width, or sizes nobody can mean.
    """
    for clusters in sizes:
        if clusters < 1 or points < clusters or restarts < 1 or sweeps < 0:
            raise UserError(
                f"k-means: {clusters} clusters from {points} points, {restarts} restarts, {sweeps} "
                "sweeps: needs at least one cluster, a point for each, one restart, and no "
                "negative number of sweeps"
            )
    sample_ND, seen = _sample(stream(), points, numpy_generator(seed, "sample"))
    for clusters in sizes:
        if len(sample_ND) < clusters:
            raise UserError(
                f"k-means: {clusters} clusters of {len(sample_ND)} frames; ask for fewer clusters "
                "or fit on more of the data"
            )
    found = [Clusters(_start(sample_ND, size, restarts, seed), source) for size in sizes]
    held = [sample_ND] if seen <= points else None
    del sample_ND
    for _ in range(sweeps):
        going = [i for i, fitted in enumerate(found) if not _settled(fitted, tolerance)]
        if not going:
            break
        moved = _sweep([found[i].centres_KD for i in going], stream() if held is None else held)
        for i, (centres_KD, value) in zip(going, moved, strict=True):
            found[i] = Clusters(centres_KD, source, (*found[i].inertia, value))
    return found


def _settled(fitted: Clusters, tolerance: float) -> bool:
    """The last sweep hardly lowered the mean squared distance."""
    if len(fitted.inertia) < 2:
        return False
    before, last = fitted.inertia[-2:]
    return before - last <= tolerance * before


def whitened(features_ND: Floats, components: int) -> Floats:
    """(N, E) principal components of unit variance, every row of unit length (DeepCluster).

    E: `components`, or fewer where the features have no more that vary.
    """
    x_ND = features_ND.astype(np.float64)
    x_ND -= x_ND.mean(0)
    values, vectors = np.linalg.eigh(x_ND.T @ x_ND / max(1, len(x_ND) - 1))
    kept = np.flatnonzero(values > _SAME * values[-1])[::-1][:components]
    white_NE = x_ND @ (vectors[:, kept] / np.sqrt(values[kept]))
    norm_N1 = np.linalg.norm(white_NE, axis=1, keepdims=True)
    unit_NE: Floats = (white_NE / np.maximum(norm_N1, 1e-12)).astype(np.float32)
    return unit_NE


# ---------------------------------------------------------------- the stream


def _check(features_ND: Floats, width: int) -> None:
    if features_ND.ndim != 2 or features_ND.shape[1] != width:
        raise UserError(f"features of shape {features_ND.shape}, the clusters have width {width}")
    if not np.isfinite(features_ND).all():
        raise UserError("features hold numbers that are not finite; look at the model or the audio")


def _pieces(stream: Iterable[Floats], width: int) -> Iterator[Floats]:
    """The stream in pieces of at most _ROWS frames."""
    for features_ND in stream:
        _check(features_ND, width)
        for first in range(0, len(features_ND), _ROWS):
            yield features_ND[first : first + _ROWS]
        del features_ND  # before the stream makes the next one


def _sample(stream: Iterable[Floats], points: int, rng: np.random.Generator) -> tuple[Floats, int]:
    """A uniform sample of at most `points` frames (reservoir sampling, Vitter's algorithm R).

    Returns:
        the sample, and how many frames there are.
    """
    kept_ND: Floats | None = None
    seen = 0
    for features_ND in stream:
        if kept_ND is None:
            kept_ND = np.empty((points, features_ND.shape[-1]), np.float32)
        _check(features_ND, kept_ND.shape[1])
        free = features_ND[: max(0, points - seen)]
        kept_ND[seen : seen + len(free)] = free
        rest = features_ND[len(free) :]
        if len(rest):
            numbers = np.arange(seen + len(free), seen + len(features_ND))
            places = rng.integers(0, numbers + 1)
            for row in np.flatnonzero(places < points):
                kept_ND[places[row]] = rest[row]
        seen += len(features_ND)
        del features_ND, free, rest
    if kept_ND is None:
        return np.empty((0, 0), np.float32), 0
    return kept_ND[: min(seen, points)], seen


# ---------------------------------------------------------------- the start


def _start(sample_ND: Floats, clusters: int, restarts: int, seed: int) -> Floats:
    """The best of several starts on the sample."""
    tried: list[tuple[float, Floats]] = []
    for number in range(restarts):
        centres_KD, value = (
            _spread(sample_ND, clusters, numpy_generator(seed, "start", number)),
            0.0,
        )
        for _ in range(_START_SWEEPS):
            ((centres_KD, value),) = _sweep([centres_KD], [sample_ND])
        tried.append((value, centres_KD))
    return min(tried, key=lambda pair: pair[0])[1]


def _spread(sample_ND: Floats, clusters: int, rng: np.random.Generator) -> Floats:
    """k-means++: each further centre is a frame drawn in proportion to its squared distance."""
    x_ND = sample_ND - sample_ND.mean(0)
    norms_N = np.einsum("nd,nd->n", x_ND, x_ND).astype(np.float64)
    chosen = [int(rng.integers(len(x_ND)))]
    near_N = np.full(len(x_ND), np.inf)
    while True:
        last = chosen[-1]
        gap_N = norms_N - 2.0 * (x_ND @ x_ND[last]) + norms_N[last]
        gap_N[gap_N < _SAME * (norms_N + norms_N[last])] = 0.0
        near_N = np.minimum(near_N, gap_N)
        if len(chosen) == clusters:
            return sample_ND[chosen]
        total_N = np.cumsum(near_N)
        if total_N[-1] <= 0.0:
            raise UserError(
                f"k-means: {clusters} clusters, but the features take {len(chosen)} different "
                "values only; ask for fewer clusters, or look at the features"
            )
        pick = np.searchsorted(total_N, rng.random() * total_N[-1], side="right")
        # rounding may end behind the last frame that is no centre yet
        chosen.append(min(int(pick), int(np.flatnonzero(near_N)[-1])))


# ---------------------------------------------------------------- one iteration


class _Search:
    """Squared distance to, and number of, the nearest centre."""

    def __init__(self, centres_KD: Floats) -> None:
        # |x|^2 - 2 x c + |c|^2 loses digits when all lies far from zero
        self._shift_D = centres_KD.mean(0)
        self._index = faiss.IndexFlatL2(centres_KD.shape[1])
        self._index.add(np.ascontiguousarray(centres_KD - self._shift_D))

    def __call__(self, x_ND: Floats) -> tuple[Floats, Ints]:
        if not len(x_ND):
            return np.empty(0, np.float32), np.empty(0, np.int64)
        gap_N1, ids_N1 = self._index.search(np.ascontiguousarray(x_ND - self._shift_D), 1)
        return np.maximum(gap_N1[:, 0], 0.0), ids_N1[:, 0]


@dataclass
class _Far:
    """The frames farthest from their centres, at most _FAR of them."""

    frames: list[Floats] = field(default_factory=list)
    gaps: list[Floats] = field(default_factory=list)

    def add(self, x_ND: Floats, gap_N: Floats) -> None:
        """Remember the farthest of these, too."""
        top = np.argsort(-gap_N, kind="stable")[:_FAR]
        frames = np.concatenate([*self.frames, x_ND[top]])
        gaps = np.concatenate([*self.gaps, gap_N[top]])
        kept = np.argsort(-gaps, kind="stable")[:_FAR]
        self.frames, self.gaps = [frames[kept]], [gaps[kept]]

    def take(self, count: int) -> Iterator[Floats]:
        """Far frames, each far from those before it, too; fewer where there are no more."""
        frames, gaps = self.frames[0], self.gaps[0].copy()
        for _ in range(count):
            i = int(gaps.argmax())
            if gaps[i] <= 0:
                return
            yield frames[i]
            gaps = np.minimum(gaps, np.square(frames - frames[i]).sum(1))


class _Iteration:
    """Running sums of one iteration of Lloyd's algorithm."""

    def __init__(self, centres_KD: Floats) -> None:
        self.centres_KD, self.search, self.far = centres_KD, _Search(centres_KD), _Far()
        self.sums_KD = torch.zeros(centres_KD.shape, dtype=torch.float64)
        self.counts_K = torch.zeros(len(centres_KD), dtype=torch.int64)
        self.distance, self.seen = 0.0, 0

    def add(self, x_ND: Floats) -> None:
        """Count these frames in."""
        gap_N, ids = self.search(x_ND)
        ids_N = torch.from_numpy(ids)
        self.sums_KD.index_add_(0, ids_N, torch.from_numpy(x_ND.astype(np.float64)))
        self.counts_K += torch.bincount(ids_N, minlength=len(self.counts_K))
        self.distance += float(gap_N.sum(dtype=np.float64))
        self.seen += len(x_ND)
        self.far.add(x_ND, gap_N)

    def end(self) -> tuple[Floats, float]:
        """Means of the frames nearest to each centre, and the mean squared distance before that.

        A cluster without a frame moves to a frame that is far from its own centre.
        """
        means_KD: Any = (self.sums_KD / self.counts_K.clamp(min=1)[:, None]).float().numpy()
        empty = np.flatnonzero(self.counts_K.numpy() == 0)
        means_KD[empty] = self.centres_KD[empty]
        for k, frame_D in zip(empty, self.far.take(len(empty)), strict=False):
            means_KD[k] = frame_D
        return means_KD, self.distance / max(1, self.seen)


def _sweep(several: Sequence[Floats], stream: Iterable[Floats]) -> list[tuple[Floats, float]]:
    """One iteration of each of several clusterings (K, D) over the stream."""
    iterations = [_Iteration(centres_KD) for centres_KD in several]
    for x_ND in _pieces(stream, several[0].shape[1]):
        for iteration in iterations:
            iteration.add(x_ND)
        del x_ND
    return [iteration.end() for iteration in iterations]
