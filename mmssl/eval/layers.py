"""All layers of frozen towers, and probes whose layer is chosen without the speaker of the test.

Letters in shapes: N clips, P items of a view, T time steps, E width of a step, D of a vector.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmssl.data.ordered import eval_batches
from mmssl.eval import folds as folding
from mmssl.eval.embed import Rows
from mmssl.eval.features import (
    SIGNAL,
    Singles,
    moved_batch,
    pooled,
    present_batches,
    signal_frames,
    signal_statistics,
    tower_of,
)
from mmssl.eval.folds import Fold, Labels
from mmssl.eval.probe import linear
from mmssl.eval.retrieval import normalize
from mmssl.eval.session import Session
from mmssl.specs import DataSpec, ViewSpec
from mmssl.towers import AnyTower, Tower
from mmssl.types import Batch, ViewBatch

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Keep = Callable[[Mapping[str, Any]], bool]

GRID = (1e-3, 1e-2, 1e-1, 1.0)  # inverse strengths of the L2 penalty
C = 1e-2  # by which layers are compared: the others change little and cost four times as much


def layer_steps(tower: AnyTower, view: ViewBatch) -> tuple[dict[str, Tensor], Tensor]:
    """(P, T, E) outputs of every layer by its number from 1 on, and padding (P, T).

    Cells of one time step stand side by side. A convolutional network shows its `output` alone.
    """
    if isinstance(tower, Tower):
        found, pad_PN = tower.layers(view)
        layers = {str(number): x_PND for number, x_PND in enumerate(found) if number}
        steps = tower.grid_of(view.data.shape[1:])[0]
    else:
        tokens = tower.encode(view, 1.0)
        layers, pad_PN, steps = {"output": tokens.x_PND}, tokens.pad_PN, tokens.grid[0]
    pad_PT = pad_PN.reshape(len(pad_PN), steps, -1).all(2)
    return {name: x.reshape(len(x), steps, -1) for name, x in layers.items()}, pad_PT


@dataclass
class LayerFeatures:
    """Vectors (N, D) of the clips of `rows` by model and layer; frames of those that were kept.

    A vector holds mean, deviation and maximum over time; frames are unit rows (T, E).
    kept: numbers of the clips with frames.
    """

    rows: Rows = field(default_factory=Rows)
    vectors: dict[str, dict[str, Singles]] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    frames: dict[str, dict[str, list[Floats]]] = field(default_factory=dict)

    def add_rows(self, batch: Batch, view: ViewBatch, keep: Keep) -> list[int]:
        """Note the items of a view; returns the numbers of those whose frames are kept."""
        rows, first = view.rows_P.tolist(), len(self.rows.keys)
        kept = [i for i, row in enumerate(rows) if keep(batch.meta[row])]
        self.rows.add_some(batch, rows)
        self.kept += [first + i for i in kept]
        return kept

    def add(self, model: str, layer: str, x_PD: Singles, frames: Iterable[Singles]) -> None:
        """Vectors of the same items, and frames (T, E) of the kept ones."""
        own = self.vectors.setdefault(model, {})
        own[layer] = np.concatenate([own[layer], x_PD]) if layer in own else x_PD
        held = self.frames.setdefault(model, {}).setdefault(layer, [])
        held += [normalize(x_TE) for x_TE in frames]


def encode(session: Session, keep: Keep) -> LayerFeatures:
    """Features of all clips of the session, of all its models.

    keep: of which clips, by their meta, frames stay in memory.

    Raises:
        UserError: run or clips lack the modality.
    """
    found = LayerFeatures()
    for name, batch in present_batches(session, []):
        kept = found.add_rows(batch, batch.views[name], keep)
        for model_name, model in session.models.items():
            moved = moved_batch(model, batch).views[name]
            layers, pad_PT = layer_steps(tower_of(session, model, name), moved)
            for layer, x_PTE in layers.items():
                vectors_PD = pooled(x_PTE.float(), pad_PT, "mean_std_max").cpu().numpy()
                frames = (x_PTE[i][~pad_PT[i]].float().cpu().numpy() for i in kept)
                found.add(model_name, layer, vectors_PD, frames)
    return found


def encode_signal(folder: Path, hz: int, keep: Keep) -> LayerFeatures:
    """The same of what a trivial listener hears: statistics and frames of log-mel bands."""
    found, views = LayerFeatures(), {"x": ViewSpec(modality="audio", hz=hz)}
    for batch in eval_batches(folder, DataSpec(), views, 16, None, workers=0):
        view = batch.views["x"]
        kept = found.add_rows(batch, view, keep)
        frames = (signal_frames(view, i).numpy() for i in kept)
        found.add(SIGNAL, SIGNAL, signal_statistics(view).numpy(), frames)
    return found


# --- the probe


@dataclass
class Nested:
    """Accuracy by group left out, and the layer and C that were chosen for it on the others."""

    accuracy: dict[str, float] = field(default_factory=dict)
    layer: dict[str, str] = field(default_factory=dict)
    c: dict[str, float] = field(default_factory=dict)

    def update(self, other: Nested) -> None:
        """Take over the groups of another one."""
        self.accuracy |= other.accuracy
        self.layer |= other.layer
        self.c |= other.c

    @property
    def usual(self) -> tuple[str, float]:
        """The layer and C chosen most often."""
        pairs = zip(self.layer.values(), self.c.values(), strict=True)
        return Counter(pairs).most_common(1)[0][0]


def nested(
    layers: Mapping[str, Singles],
    labels: Labels,
    groups_N: NDArray[np.str_],
    outer: Sequence[str] | None = None,
) -> Nested:
    """Leave one group out; choose layer, then its C, by leaving out one of the others, in turn.

    A probe fitted without two groups serves both: it chooses for either one by its accuracy on the
    other. Of equal choices the first counts.

    outer: the groups that are left out for good, all if None.

    Raises:
        UserError: the clips outside of two groups have all one label, or there are none.
    """
    rows = {str(name): np.flatnonzero(groups_N == name) for name in np.unique(groups_N)}
    known: dict[tuple[str, float, str, str], dict[str, float]] = {}

    def chosen_by(own: str, layer: str, c: float) -> float:
        found = []
        for other in rows.keys() - {own}:
            a, b = sorted((own, other))
            if (layer, c, a, b) not in known:
                pair = {a: rows[a], b: rows[b]}
                known[layer, c, a, b] = _accuracy(layers[layer], labels, c, pair)
            found.append(known[layer, c, a, b][other])
        return math.fsum(found) / len(found)

    result = Nested()
    for own in rows if outer is None else outer:
        by_layer = {layer: chosen_by(own, layer, C) for layer in layers}
        layer = max(by_layer, key=by_layer.__getitem__)
        by_c = {c: chosen_by(own, layer, c) for c in GRID}
        c = max(by_c, key=by_c.__getitem__)
        result.layer[own], result.c[own] = layer, c
        result.accuracy |= _accuracy(layers[layer], labels, c, {own: rows[own]})
    return result


def _accuracy(x_ND: Singles, labels: Labels, c: float, out: Mapping[str, Ints]) -> dict[str, float]:
    """Accuracy on the rows of each of the groups that are left out together."""
    test = np.concatenate(list(out.values()))
    train = np.setdiff1d(np.arange(len(x_ND)), test)
    fold = Fold(" and ".join(out), train, test[:0], test)
    scores, _ = linear(x_ND, labels, [fold], grid=(c,))
    return {name: folding.score(scores, labels, rows)["accuracy"] for name, rows in out.items()}
