"""All layers of frozen towers side by side, and probes whose C is chosen without the test's group.

Letters in shapes: N clips, P items of a view, T time steps, E width of a step, D of a vector.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmssl.backbones.convnets import ConvNet, Stack
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
from mmssl.eval.folds import Labels
from mmssl.eval.probe import regressions
from mmssl.eval.retrieval import normalize
from mmssl.eval.session import Session
from mmssl.frontends.patches import padding_mask, stack_lengths
from mmssl.specs import DataSpec, ViewSpec
from mmssl.towers import AnyTower, Tower
from mmssl.types import Batch, ViewBatch

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Keep = Callable[[Mapping[str, Any]], bool]

GRID = (1e-2, 1e-1)  # inverse strengths of the L2 penalty


def layer_steps(tower: AnyTower, view: ViewBatch) -> list[tuple[Tensor, Tensor]]:
    """Outputs (P, T, E) of every layer, the first one first, each with its padding (P, T).

    Cells of one time step stand side by side. Layers of a convolutional network are its last maps
    of every stride above 1, and its output.
    """
    if isinstance(tower, Tower):
        found, pad_PN = tower.layers(view)
        grid = tower.grid_of(view.data.shape[1:])
        return [_steps(x_PND, pad_PN, grid) for x_PND in list(found)[1:]]
    recording: AbstractContextManager[dict[int, tuple[Tensor, Stack]]] = nullcontext({})
    if isinstance(tower.network, ConvNet):  # others show their output alone
        recording = tower.network.recorded()
    with recording as maps:
        tokens = tower.encode(view, 1.0)
    frames_P, layers = tower.frames(view), []
    for stride, (x, stack) in maps.items():
        cells_PND = x.flatten(2).transpose(1, 2)
        if stride == 1 or cells_PND.shape == tokens.x_PND.shape:  # too large; the output itself
            continue
        pad_PN = padding_mask(stack_lengths(frames_P, *stack), x.shape[2:])
        layers.append(_steps(cells_PND, pad_PN, x.shape[2:]))
    return [*layers, _steps(tokens.x_PND, tokens.pad_PN, tokens.grid)]


def _steps(x_PND: Tensor, pad_PN: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cells of a grid (T, ...) as (P, T, E), and which steps are padding."""
    pad_PT = pad_PN.reshape(len(pad_PN), grid[0], -1).all(2)
    return x_PND.float().reshape(len(x_PND), grid[0], -1), pad_PT


@dataclass
class LayerFeatures:
    """Vectors (N, D) of the clips of `rows` by model; frames of those that were kept.

    A vector holds mean and deviation over time, frames (T, E) are rows of unit length; layers stand
    side by side in both, in frames those with as many steps as the output. None is chosen: the best
    one for five speakers often is not the sixth's.
    kept: numbers of the clips with frames.
    """

    rows: Rows = field(default_factory=Rows)
    vectors: dict[str, Singles] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    frames: dict[str, list[Floats]] = field(default_factory=dict)

    def add_rows(self, batch: Batch, view: ViewBatch, keep: Keep) -> list[int]:
        """Note the items of a view; returns the numbers of those whose frames are kept."""
        rows, first = view.rows_P.tolist(), len(self.rows.keys)
        kept = [i for i, row in enumerate(rows) if keep(batch.meta[row])]
        self.rows.add_some(batch, rows)
        self.kept += [first + i for i in kept]
        return kept

    def add(self, model: str, x_PD: Singles, frames: Iterable[Singles]) -> None:
        """Vectors of the same items, and frames (T, E) of the kept ones."""
        known = self.vectors.get(model)
        self.vectors[model] = x_PD if known is None else np.concatenate([known, x_PD])
        self.frames.setdefault(model, []).extend(normalize(x_TE) for x_TE in frames)


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
            layers = layer_steps(tower_of(session, model, name), moved)
            vectors = [pooled(x_PTE, pad_PT, "mean_std") for x_PTE, pad_PT in layers]
            # each layer of unit length: none outweighs the others
            pad_PT = layers[-1][1]
            alike = [x_PTE for x_PTE, pad in layers if pad.shape == pad_PT.shape]
            units_PTE = torch.cat([F.normalize(x_PTE, dim=-1) for x_PTE in alike], -1)
            frames = (units_PTE[i][~pad_PT[i]].cpu().numpy() for i in kept)
            found.add(model_name, torch.cat(vectors, -1).cpu().numpy(), frames)
    return found


def encode_signal(folder: Path, hz: int, keep: Keep) -> LayerFeatures:
    """The same of what a trivial listener hears: statistics and frames of log-mel bands."""
    found, views = LayerFeatures(), {"x": ViewSpec(modality="audio", hz=hz)}
    for batch in eval_batches(folder, DataSpec(), views, 16, None, workers=0):
        view = batch.views["x"]
        kept = found.add_rows(batch, view, keep)
        frames = (signal_frames(view, i).numpy() for i in kept)
        found.add(SIGNAL, signal_statistics(view).numpy(), frames)
    return found


# --- the probe


@dataclass
class Nested:
    """Accuracy by group left out, and the C that was chosen for it on the others."""

    accuracy: dict[str, float] = field(default_factory=dict)
    c: dict[str, float] = field(default_factory=dict)

    def update(self, other: Nested) -> None:
        """Take over the groups of another one."""
        self.accuracy |= other.accuracy
        self.c |= other.c

    @property
    def usual(self) -> float:
        """The C chosen most often."""
        return Counter(self.c.values()).most_common(1)[0][0]


def nested(
    x_ND: Singles,
    labels: Labels,
    groups_N: NDArray[np.str_],
    outer: Sequence[str] | None = None,
) -> Nested:
    """Leave one group out; choose its C by leaving out one of the others, in turn.

    A probe fitted without two groups serves both: it chooses for either one by its accuracy on the
    other. Of equal choices the first counts.

    outer: the groups that are left out for good, all if None.

    Raises:
        UserError: the clips outside of two groups have all one label, or there are none.
    """
    rows = {str(name): np.flatnonzero(groups_N == name) for name in np.unique(groups_N)}
    x = x_ND.astype(np.float64)
    known: dict[tuple[str, str], dict[float, dict[str, float]]] = {}

    def chosen_by(own: str, c: float) -> float:
        found = []
        for other in rows.keys() - {own}:
            a, b = sorted((own, other))
            if (a, b) not in known:
                known[a, b] = _accuracy(x, labels, GRID, {a: rows[a], b: rows[b]})
            found.append(known[a, b][c][other])
        return math.fsum(found) / len(found)

    result = Nested()
    for own in rows if outer is None else outer:
        c = max(GRID, key=partial(chosen_by, own))
        result.c[own] = c
        result.accuracy |= _accuracy(x, labels, (c,), {own: rows[own]})[c]
    return result


def _accuracy(
    x_ND: Floats, labels: Labels, grid: Sequence[float], out: Mapping[str, Ints]
) -> dict[float, dict[str, float]]:
    """By C, the accuracy on the rows of each of the groups that are left out together."""
    test = np.concatenate(list(out.values()))
    train = np.setdiff1d(np.arange(len(x_ND)), test)
    found = {}
    scores_NK = np.full(labels.table_NK.shape, np.nan)
    several = regressions(x_ND, labels, train, test, grid, " and ".join(out))
    for c, guess_PK in zip(grid, several, strict=True):
        scores_NK[test] = guess_PK
        found[c] = {n: folding.score(scores_NK, labels, r)["accuracy"] for n, r in out.items()}
    return found
