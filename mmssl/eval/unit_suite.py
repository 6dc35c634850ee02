"""`mmssl eval units RUN label=FIELD [units=SIDECAR]`: what discrete units tell of classes.

Units are those of a side-car, or clusters of the frames of a layer. Classes are those of clips or
of stretches of time (`segments=FIELD`).

Letters in shapes: T frames, D width, Y classes, Z units.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmssl.data.sidecars import SideCar
from mmssl.eval.features import SIGNAL
from mmssl.eval.items import Metrics
from mmssl.eval.results import Results, interval_of, plot
from mmssl.eval.session import RANDOM, TRAINED, Session, progress
from mmssl.eval.spans import Span, SpanSpec, labelled_clips
from mmssl.eval.units import joint_counts, unit_quality
from mmssl.types import UserError

Ints = NDArray[np.int64]

_FITTED = 200_000  # frames that clusters are fitted to
_PARTS = 20  # random parts of the clips, which the bootstrap draws


class Options(SpanSpec):
    """What can be set behind `mmssl eval units RUN`."""

    units: str = ""  # side-car of data_tools.label_shards; empty = clusters of the layer's frames
    clusters: int = Field(50, gt=1)  # k of the clustering


@dataclass(frozen=True)
class Units:
    """Units of one clip: ids (T,), per second, centre of the first (s)."""

    ids_T: Ints
    rate_hz: float
    first_s: float


def evaluate(session: Session) -> Results:
    """Results of the suite.

    Raises:
        UserError: no such field or side-car, no modality, or one class only.
    """
    options = cast("Options", session.options)
    if options.units:
        session.models.pop(RANDOM, None)  # units of a file have no random twin
    unlabelled: list[str] = []
    clips = list(labelled_clips(session, options, unlabelled))
    spans = [found for _, found in clips]
    names = sorted({span.name for found in spans for span in found})
    if options.units:
        kinds = {TRAINED: from_sidecar(SideCar(Path(options.units)), [c.key for c, _ in clips])}
        sizes = {TRAINED: SideCar(Path(options.units)).info.classes[0]}
    else:
        kinds, sizes = {}, {}
        for name in progress(list(clips[0][0].frames), "clustering"):
            rates = [(c.rate_hz[name], c.first_s[name]) for c, _ in clips]
            ids = clustered([c.frames[name] for c, _ in clips], options.clusters, options.seed)
            kinds[name] = [Units(x, *rate) for x, rate in zip(ids, rates, strict=True)]
            sizes[name] = options.clusters
    made = {
        name: measured(units, spans, names, sizes[name], session) for name, units in kinds.items()
    }
    found = session.facts("units", [c.meta for c, _ in clips])
    share = made[TRAINED].pop("majority")
    found["units"] = {**made[TRAINED], "classes": len(names), "clips": len(clips)}
    found["units"]["unlabelled"] = len(unlabelled)
    found["trivial"] = {"units": {"majority": share} | _named(SIGNAL, made)}
    found |= {"random_encoder": {"units": made[RANDOM]}} if RANDOM in made else {}
    x = ["pnmi", "phone_purity", "cluster_purity"]
    lines = {name: [part[key] for key in x] for name, part in made.items()}
    bounds = {name: [interval_of(part, key) for key in x] for name, part in made.items()}
    lines["majority"] = [0.0, share, None]
    found["plots"] = [plot("Units against classes", "measure", x, lines, bounds)]
    return found


def _named(name: str, made: dict[str, Metrics]) -> Metrics:
    return {name: made[name]} if name in made else {}


def from_sidecar(car: SideCar, keys: list[str]) -> list[Units]:
    """Units of the clips; none where the side-car lacks a clip.

    Raises:
        UserError: it lacks all of them.
    """
    if not any(key in car for key in keys):
        raise UserError(f"{car.path}: labels none of these clips; make units of the same shards")
    rate, first = car.info.rate_hz, car.info.source.first_centre_s
    return [
        Units(np.asarray(car.ids(key)[:, 0] if key in car else [], np.int64), rate, first)
        for key in keys
    ]


def clustered(frames: list[NDArray[Any]], clusters: int, seed: int) -> list[Ints]:
    """Cluster of every frame of every clip; fitted to at most 200,000 of them.

    Raises:
        UserError: fewer frames than clusters.
    """
    from sklearn.cluster import MiniBatchKMeans

    x_TD = np.concatenate(frames).astype(np.float64)
    if len(x_TD) < clusters:
        raise UserError(f"clusters={clusters}: there are only {len(x_TD)} frames; ask for fewer")
    fitted = np.random.default_rng(seed).permutation(len(x_TD))[:_FITTED]
    model = MiniBatchKMeans(clusters, random_state=seed, batch_size=4096, n_init=3)
    model.fit(x_TD[np.sort(fitted)])
    ends = np.cumsum([len(x) for x in frames])[:-1]
    return [np.asarray(part, np.int64) for part in np.split(model.predict(x_TD), ends)]


def frame_classes(units: Units, spans: list[Span], names: list[str]) -> Ints:
    """(T,) class of each frame, -1 outside all stretches."""
    classes_T = np.full(len(units.ids_T), -1, dtype=np.int64)
    for span in spans:
        inside = span.holds(len(classes_T), units.rate_hz, units.first_s)
        classes_T[inside] = names.index(span.name)
    return classes_T


def measured(
    units: list[Units], spans: list[list[Span]], names: list[str], size: int, session: Session
) -> Metrics:
    """Quality of all frames, mean length of a run of one unit, interval of the PNMI.

    The interval is a bootstrap over 20 random parts of the clips.
    """
    parts = np.zeros((_PARTS, len(names), size), dtype=np.int64)
    part_of = np.random.default_rng(session.options.seed).permutation(len(units)) % _PARTS
    frames, runs, rate_hz = 0, 0, units[0].rate_hz
    for part, one, found in zip(part_of, units, spans, strict=True):
        parts[part] += joint_counts(frame_classes(one, found, names), one.ids_T, len(names), size)
        frames += len(one.ids_T)
        runs += int((np.diff(one.ids_T) != 0).sum()) + (len(one.ids_T) > 0)
    counts_YZ = parts.sum(axis=0)
    result: Metrics = asdict(unit_quality(counts_YZ))
    result["mean_segment_frames"] = frames / max(1, runs)
    result["mean_segment_s"] = frames / max(1, runs) / rate_hz if rate_hz else None
    result["majority"] = float(counts_YZ.sum(axis=1).max() / counts_YZ.sum())
    if session.options.resamples and len(units) >= _PARTS:
        rng = np.random.default_rng(session.options.seed)
        draws = rng.multinomial(_PARTS, [1 / _PARTS] * _PARTS, session.options.resamples)
        tables = (np.tensordot(draw, parts, 1) for draw in draws)
        values = [unit_quality(t).pnmi for t in tables if (t.sum(axis=1) > 0).sum() > 1]
        result["ci"] = {"pnmi": [float(q) for q in np.quantile(values, [0.025, 0.975])]}
    return result
