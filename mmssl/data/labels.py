"""Frame labels of a run: which side-cars it reads, how labels meet frames, and what makes them bad.

Labels travel at their own rate: a view carries those of its cut, a batch pads them with -1, and the
task that knows the model's frames picks one label per frame (`frame_ids`).

Letters in shapes: S samples, N labels, T frames of a model, G codebooks, P items.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmssl.data.integrity import DamagedSampleError
from mmssl.data.sidecars import MAKE, Ints, SideCar, shards_digest
from mmssl.specs import CodesSpec
from mmssl.types import FrameLabels, UserError, ViewBatch

NO_LABEL = -1
_AGAIN = "cluster again, with other features or another seed"
_EPSILON = 1e-6  # of a label: rates such as 16000 / 480 Hz are not exact


class LabelKind(NamedTuple):
    """What a loader must know of a name before it sees a label."""

    rate_hz: float
    codebooks: int


# ---------------------------------------------------------------- alignment


def label_count(length: int, rate: float, rate_hz: float) -> int:
    """Labels of a cut of so many units (samples, frames) at `rate`."""
    return round(length / rate * rate_hz)


def window(ids_NG: Ints, rate_hz: float, start_s: float, count: int) -> Ints:
    """(count, G) labels from round(start_s * rate_hz) on; -1 where the sample has none.

    The rounding is HuBERT's: any other shifts the targets of some crops by a label.
    """
    first = round(start_s * rate_hz)
    out_NG = np.full((count, ids_NG.shape[1]), NO_LABEL, dtype=np.int64)
    low, high = max(first, 0), min(first + count, len(ids_NG))
    if high > low:
        out_NG[low - first : high - first] = ids_NG[low:high]
    return out_NG


def at_frames(ids_PNG: Tensor, rate_hz: float, frames: int, frame_hz: float) -> Tensor:
    """(..., T, G) labels of a model's frames: frame t takes label floor(t * rate_hz / frame_hz).

    ids_PNG: (..., N, G), label 0 at the start of frame 0; frames behind the last label get -1.
    """
    steps_T = torch.arange(frames, device=ids_PNG.device, dtype=torch.float64)
    index_T = (steps_T * (rate_hz / frame_hz) + _EPSILON).long()
    count = ids_PNG.shape[-2]
    if count == 0:
        return ids_PNG.new_full((*ids_PNG.shape[:-2], frames, ids_PNG.shape[-1]), NO_LABEL)
    taken = ids_PNG.index_select(-2, index_T.clamp(max=count - 1))
    return taken.masked_fill((index_T >= count)[:, None], NO_LABEL)


def crop(ids_NG: Ints, rate_hz: float, start_s: float, frames: int, frame_hz: float) -> Tensor:
    """(T, G) labels of a model's frames in a crop that starts at start_s.

    `window`, then `at_frames`: 98 MFCC labels at 100 Hz serve the 49 frames of one second.
    """
    count = math.ceil(frames * rate_hz / frame_hz)
    cut_NG = torch.from_numpy(window(ids_NG, rate_hz, start_s, count))
    return at_frames(cut_NG, rate_hz, frames, frame_hz)


def frame_ids(view: ViewBatch, name: str, frames: int, frame_hz: float) -> Tensor:
    """(P, T, G) labels of a view's frames, -1 where there is none; for tasks.

    Raises:
        UserError: the view carries no labels of that name.
        ValueError: labels of other items than the view's.
    """
    labels = view.labels.get(name)
    if labels is None:
        raise UserError(
            f"data.frame_labels: the batch carries no labels {name!r} (there are "
            f"{', '.join(view.labels) or 'none'}); name a side-car of the shards that are read"
        )
    if len(labels.ids) != len(view.data):
        raise ValueError(
            f"labels {name!r} of {len(labels.ids)} items in a view of {len(view.data)}"
        )
    return at_frames(labels.ids, labels.rate_hz, frames, frame_hz)


# ---------------------------------------------------------------- what a run reads


def listed(names: str | Iterable[str]) -> list[str]:
    """Files or folders of an entry of `data` that is one name or several."""
    return [names] if isinstance(names, str) else list(names)


@dataclass
class LabelBook:
    """The side-cars of a run by name; a sample is looked up by its key, which is globally unique.

    kinds: rate and number of codebooks by name. digests: what identifies the files' content.
    """

    cars: dict[str, list[SideCar]] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, LabelKind]:
        """Rate and number of codebooks by name."""
        infos = {name: cars[0].info for name, cars in self.cars.items()}
        return {name: LabelKind(i.rate_hz, len(i.classes)) for name, i in infos.items()}

    @property
    def digests(self) -> dict[str, list[str]]:
        """Hashes of the files' headers, which hold the checksums of their content."""
        return {name: sorted(car.digest for car in cars) for name, cars in self.cars.items()}

    @classmethod
    def open(
        cls, paths: Mapping[str, str | Sequence[str]], folders: Sequence[str | Path], required: bool
    ) -> LabelBook:
        """Open the side-cars of these shard folders.

        Args:
            paths: `data.frame_labels`.
            folders: shard folders that will be read.
            required: every folder must have a side-car of every name; else names without one are
                left out, so that a run can be evaluated where its labels are not.

        Raises:
            UserError: a file is no side-car, side-cars of one name differ in their clustering, or a
                folder has none.
        """
        if not paths:
            return cls()
        digests = {folder: shards_digest(folder) for folder in folders}
        book: dict[str, list[SideCar]] = {}
        for name in paths:
            files = listed(paths[name])
            there = [file for file in files if required or Path(file).is_file()]
            cars = _alike(name, [SideCar(file) for file in there])
            found = {car.info.shards: car for car in cars}
            lacking = [folder for folder in folders if digests[folder] not in found]
            if lacking and required:
                raise UserError(
                    f"data.frame_labels.{name}: {', '.join(files) or 'no file'}: labels of other "
                    f"shards than {lacking[0]}; {MAKE}"
                )
            if not lacking:
                book[name] = [found[digest] for digest in dict.fromkeys(digests.values())]
        return cls(book)

    def check_codes(self, where: str, codes: CodesSpec, hz: float) -> None:
        """Refuse labels that a view cannot hold as its ids.

        Raises:
            UserError: no side-car of that name, or one of another rate or number of classes.
        """
        if codes.labels not in self.cars:
            raise UserError(
                f"{where}.codes.labels: data.frame_labels names no side-car {codes.labels!r} of "
                f"the shards that are read; {MAKE}"
            )
        car = self.cars[codes.labels][0]
        if car.info.rate_hz != hz:
            raise UserError(
                f"{where}.hz: {hz:g}, but {car.path} holds {car.info.rate_hz:g} labels per second; "
                "make them equal"
            )
        if car.info.classes != (codes.classes,):
            raise UserError(
                f"{where}.codes.classes: {codes.classes}, but {car.path} has codebooks of "
                f"{car.info.classes} classes; make them equal, or label with other --codes"
            )

    def cut(self, key: str, start_s: float, length: int, rate: float) -> dict[str, FrameLabels]:
        """Labels of a view of `length` units at `rate` that starts at start_s on the clip's clock.

        Raises:
            DamagedSampleError: a side-car lacks the sample (`labels`).
        """
        out = {}
        for name, cars in self.cars.items():
            hz = cars[0].info.rate_hz
            car = next((car for car in cars if key in car), None)
            if car is None:
                raise DamagedSampleError(
                    "labels", f"{key}: no labels {name!r} in {cars[0].path}; {MAKE}"
                )
            ids_NG = window(car.ids(key), hz, start_s, label_count(length, rate, hz))
            out[name] = FrameLabels(torch.from_numpy(ids_NG), hz)
        return out


def _alike(name: str, cars: list[SideCar]) -> list[SideCar]:
    """Side-cars under one name must be of different folders and count with the same classes."""
    for i, car in enumerate(cars[1:], start=1):
        twin = next((c for c in cars[:i] if c.info.shards == car.info.shards), None)
        if twin is not None:
            raise UserError(
                f"data.frame_labels.{name}: {twin.path} and {car.path} label the same shards; "
                "name one of them"
            )
        first, info = cars[0].info, car.info
        for what in ("source", "classes", "codebooks"):
            if getattr(first, what) != getattr(info, what):
                raise UserError(
                    f"data.frame_labels.{name}: {cars[0].path} and {car.path} differ in their "
                    f"{what}; label all folders with one clustering (label_shards --kmeans)"
                )
    return cars


def check(
    car: SideCar,
    frame_hz: float,
    samples: int | None = None,
    max_share: float = 0.7,
    max_missing: float = 0.01,
) -> list[str]:
    """What is wrong with labels for a model of frame_hz; empty = nothing. Reads the whole file.

    Args:
        car: an open side-car.
        frame_hz: tokens of the model per second.
        samples: of the shards that will be read; those of the side-car if None.
        max_share: largest share of all labels that one class may hold. Silence, the commonest
            class, holds less of speech.
        max_missing: largest share of samples that may have no label, as of samples that may be bad
            (`data.max_bad_share`).
    """
    damaged = car.damage()
    if damaged:
        return [f"{car.path}: the bytes of {', '.join(damaged)} were changed; {MAKE}"]
    out = [*_rate_problems(car, frame_hz), *_class_problems(car, max_share)]
    total = len(car) if samples is None else samples
    missing = total - (len(car) - car.empty)
    if missing > max_missing * total:
        out.append(
            f"{car.path}: {missing} of {total} samples have no label (at most {max_missing:.0%} "
            "may); label the shards that are trained on"
        )
    off_S = car.off_s()
    # the last window leaves less than a label uncovered
    far_S = np.abs(off_S) > 1 / frame_hz + 1 / car.info.rate_hz + 1e-3
    if far_S.any():
        i = int(far_S.argmax())
        out.append(
            f"{car.path}: the labels of {int(far_S.sum())} of {len(car)} samples end more than a "
            f"frame away from the sample, first {car.key(i)} by {off_S[i]:.3f} s; "
            f"the label rate or the audio is another: {MAKE}"
        )
    return out


def _rate_problems(car: SideCar, frame_hz: float) -> list[str]:
    ratio = car.info.rate_hz / frame_hz
    if round(ratio) >= 1 and abs(ratio - round(ratio)) < 1e-6 * ratio:
        return []
    return [
        f"{car.path}: labels at {car.info.rate_hz:g} Hz for a model of {frame_hz:g} frames per "
        "second; the rate must be the model's or a whole multiple of it: label with features of "
        "that rate"
    ]


def _class_problems(car: SideCar, max_share: float) -> list[str]:
    out = []
    for g, counts_K in enumerate(car.counts()):
        where = f"{car.path}: codebook {g}" if len(car.info.classes) > 1 else f"{car.path}:"
        used, total = int((counts_K > 0).sum()), int(counts_K.sum())
        if used < 2:
            out.append(
                f"{where} uses {used} of {len(counts_K)} classes: nothing to predict; {_AGAIN}"
            )
        elif counts_K.max() > max_share * total:
            out.append(
                f"{where} class {int(counts_K.argmax())} holds {counts_K.max() / total:.1%} of the "
                f"labels (at most {max_share:.0%} may); {_AGAIN}"
            )
    return out
