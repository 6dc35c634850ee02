"""One pass over a test set: everything the metrics need from one or several frozen models.

Letters in shapes: B rows of a batch, N rows of the test set, P rows kept for localization, D width,
T time bins, S cells of a time step, A audio steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.eval.localize import sounding_bins
from mmssl.eval.tables import Pair, Parts, Sides, Table, one_grid, pad_steps, sides, table
from mmssl.heads.dense import Dense
from mmssl.types import Batch, UserError, ViewBatch

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Space = tuple[str, str]


class Encoder(Protocol):
    """What evaluation asks of a model; see `Model` for the meaning of every method."""

    training: bool

    def train(self, mode: bool = True, /) -> Any:
        """Set the training flag."""
        ...

    def parameters(self) -> Iterator[Any]:
        """All parameters; the first one tells the device."""
        ...

    def passes(self, batch: Batch, /) -> Any:
        """Encodings of a batch, each made when first asked for; the other methods ask it."""
        ...

    def embed(self, batch: Batch, /) -> Mapping[Space, tuple[Tensor, Tensor]]:
        """(modality, space) -> unit embeddings (B, D) and presence (B,)."""
        ...

    def space_for(self, a: str, b: str, /) -> str | None:
        """Space in which two modalities are compared, None if they are not."""
        ...

    def dense(self, batch: Batch, /) -> Dense | None:
        """Local features, None if the method has none."""
        ...

    def score_maps(self, video: Tensor, audio: Tensor, audio_valid: Tensor, /) -> Tensor:
        """Similarity maps (P, T, S) of paired rows of local features."""
        ...

    def map_sides(self, batch: Batch, /) -> Mapping[Pair, tuple[Parts, Parts, Tensor]]:
        """What map scores read of a batch where no space relates their modalities."""
        ...

    def map_table(self, pair: Pair, video: Parts, other: Parts, /) -> Tensor:
        """(A, C) scores of A videos with C sounds or texts."""
        ...

    def match_logit(self, batch: Batch, partner: Tensor, /) -> Tensor | None:
        """(B,) score of video i with audio partner[i], above 0 = belong together."""
        ...

    def masked_stats(self, batch: Batch, /) -> Mapping[str, Mapping[str, Tensor]]:
        """Sums over hidden places, by masked task."""
        ...


@dataclass(frozen=True)
class Want:
    """What to collect: embeddings, local features, match scores, masked-prediction errors.

    maps: tables of all pairs by the map scores of modalities that share no space, see `tables`.
    """

    embeddings: bool = True
    dense: bool = True
    match: bool = True
    masked: bool = True
    maps: bool = False


@dataclass
class Rows:
    """What is known about the N rows, whatever the model; in the order of the batches."""

    keys: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    meta: list[dict[str, Any]] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Append the rows of a batch."""
        self.add_some(batch, range(batch.size))

    def add_some(self, batch: Batch, kept: Iterable[int]) -> None:
        """Append some rows of a batch."""
        for row in kept:
            self.keys.append(batch.keys[row])
            self.sources.append(int(batch.source_B[row]))
            self.texts.append(int(batch.text_B[row]))
            self.meta.append(batch.meta[row] if batch.meta else {})


@dataclass
class DenseRows:
    """Local features of the P rows that have boxes (`rows_P` are their numbers in `Rows`)."""

    rows_P: Ints
    video_PTSD: Tensor
    audio_PAD: Tensor
    valid_PA: Tensor
    times_PT: Floats
    loud_PT: Bools
    grid: tuple[int, int, int]


@dataclass
class Encoded:
    """What one model made of the test set.

    vectors: (N, D) by (modality, space), zeros where absent; present: (N,) bool by the same key.
    own_N, other_N: match scores of each video with its own audio and with another clip's; not a
    number where the row lacks one of them. masked: summed statistics by task. tables: by the two
    modalities of a map score.
    """

    vectors: dict[Space, Singles] = field(default_factory=dict)
    present: dict[Space, Bools] = field(default_factory=dict)
    dense: DenseRows | None = None
    own_N: Floats | None = None
    other_N: Floats | None = None
    masked: dict[str, dict[str, Floats]] = field(default_factory=dict)
    tables: dict[Pair, Table] = field(default_factory=dict)


class Watcher(Protocol):
    """Sees every batch once, for instance to keep pictures."""

    def add(self, batch: Batch) -> None:
        """Look at a batch."""
        ...


@contextmanager
def frozen(models: Iterable[Encoder]) -> Iterator[None]:
    """Evaluation mode without gradients; the training flag is put back."""
    before = [(model, model.training) for model in models]
    try:
        for model, _ in before:
            model.train(False)
        with torch.inference_mode():
            yield
    finally:
        for model, training in before:
            model.train(training)


@contextmanager
def encoded_once(model: Encoder, batch: Batch) -> Iterator[None]:
    """Inside, the model's methods share their encodings of this batch."""
    shared = model.passes(batch)
    # the instance's entry hides the method of its class until it is removed again
    vars(model)["passes"] = lambda *_: shared
    try:
        yield
    finally:
        del vars(model)["passes"]


def collect(
    models: Mapping[str, Encoder],
    batches: Iterable[Batch],
    wants: Mapping[str, Want] | None = None,
    seed: int = 0,
    watchers: Sequence[Watcher] = (),
) -> tuple[Rows, dict[str, Encoded]]:
    """Read the batches once and encode them with every model.

    Args:
        models: by name; all see the same batches and the same derangements.
        batches: of a test set, in a fixed order.
        wants: what to collect from each model; everything where it is not named.
        seed: of the derangements of the match score.
        watchers: see every batch before it is encoded.

    Raises:
        UserError: there is no batch, or clips differ in their grid of local features.
    """
    rows, parts = Rows(), {name: _Parts((wants or {}).get(name, Want())) for name in models}
    with frozen(models.values()):
        for number, batch in enumerate(batches):
            partner_B, apart_B = derangement(batch, np.random.default_rng([seed, number]))
            for watcher in watchers:
                watcher.add(batch)
            for name, model in models.items():
                device = next(iter(model.parameters())).device
                moved = batch.to(device)
                with encoded_once(model, moved):
                    parts[name].add(model, moved, len(rows.keys), partner_B.to(device), apart_B)
            rows.add(batch)
        if not rows.keys:
            raise UserError("evaluation: the data set holds no clip that can be read")
        return rows, {name: part.join(models[name]) for name, part in parts.items()}


def present(batch: Batch, modality: str) -> Tensor:
    """(B,) bool: some view of the modality holds the row."""
    found = torch.zeros(batch.size, dtype=torch.bool)
    for view in batch.views.values():
        if view.modality == modality and not view.dummy:
            found |= view.present_B.cpu()
    return found


def first_view(batch: Batch, modality: str) -> ViewBatch | None:
    """The first view of a modality that holds any item."""
    for view in batch.views.values():
        if view.modality == modality and not view.dummy:
            return view
    return None


def derangement(batch: Batch, rng: np.random.Generator, tries: int = 50) -> tuple[Tensor, Tensor]:
    """A partner of another source for every row with audio and video.

    A cyclic shift of a random order, so that every audio serves once; of several orders the one
    with the fewest pairs of one source.

    Returns:
        partner (B,) int64, and (B,) bool: the row has a partner of another source.
    """
    both = np.flatnonzero((present(batch, "audio") & present(batch, "video")).numpy())
    sources = batch.source_B.cpu().numpy()
    partner, apart = np.arange(batch.size), np.zeros(batch.size, dtype=bool)
    for _ in range(tries if len(both) > 1 else 0):
        order = rng.permutation(both)
        shifted = np.roll(order, -1)
        fits = sources[order] != sources[shifted]
        if fits.sum() > apart.sum():
            partner[order], apart[order] = shifted, fits
        if fits.all():
            break
    return torch.from_numpy(partner), torch.from_numpy(apart)


def localizable(meta: Mapping[str, Any]) -> bool:
    """The row shows a sounding and a silent object with boxes."""
    boxes = meta.get("boxes") or {}
    return bool(boxes.get("sounding")) and bool(boxes.get("silent"))


class _Parts:
    """Pieces of `Encoded`, batch by batch."""

    def __init__(self, want: Want) -> None:
        self.want = want
        self.embedded: list[dict[Space, tuple[Singles, Bools]]] = []
        self.dense: list[DenseRows] = []
        self.match: list[tuple[Floats, Floats]] = []
        self.masked: dict[str, dict[str, Floats]] = {}
        self.sides: dict[Pair, list[Sides]] = {}

    def add(
        self, model: Encoder, batch: Batch, first: int, partner_B: Tensor, apart_B: Tensor
    ) -> None:
        if self.want.embeddings:
            self.embedded.append({k: _pair(v) for k, v in model.embed(batch).items()})
        if self.want.dense:
            self._add_dense(model, batch, first)
        if self.want.match:
            self._add_match(model, batch, partner_B, apart_B)
        if self.want.masked:
            self._add_masked(model, batch)
        if self.want.maps:
            for pair, found in model.map_sides(batch).items():
                self.sides.setdefault(pair, []).append(sides(batch, first, *found))

    def _add_dense(self, model: Encoder, batch: Batch, first: int) -> None:
        shown = [i for i, meta in enumerate(batch.meta) if localizable(meta)]
        if not shown:
            return
        found = dense_rows(model, batch, shown, first)
        if found is not None:
            self.dense.append(found)

    def _add_match(self, model: Encoder, batch: Batch, partner_B: Tensor, apart_B: Tensor) -> None:
        own = model.match_logit(batch, torch.arange(batch.size, device=partner_B.device))
        other = model.match_logit(batch, partner_B)
        if own is None or other is None:
            return
        apart = apart_B.numpy()
        pair = (np.where(apart, logit.double().cpu().numpy(), np.nan) for logit in (own, other))
        self.match.append((next(pair), next(pair)))

    def _add_masked(self, model: Encoder, batch: Batch) -> None:
        for task, sums in model.masked_stats(batch).items():
            total = self.masked.setdefault(task, {})
            for name, value in sums.items():
                total[name] = total.get(name, 0.0) + value.double().cpu().numpy()

    def join(self, model: Encoder) -> Encoded:
        result = Encoded(masked=self.masked)
        for space in self.embedded[0] if self.embedded else ():
            result.vectors[space] = np.concatenate([part[space][0] for part in self.embedded])
            result.present[space] = np.concatenate([part[space][1] for part in self.embedded])
        if self.dense:
            result.dense = join_dense(self.dense)
        if self.match:
            result.own_N = np.concatenate([own for own, _ in self.match])
            result.other_N = np.concatenate([other for _, other in self.match])
        device = next(iter(model.parameters())).device
        for pair in list(self.sides):  # features of one pair at a time are held twice
            score = partial(model.map_table, pair)
            result.tables[pair] = table(self.sides.pop(pair), score, device, " x ".join(pair))
        return result


def _pair(value: tuple[Tensor, Tensor]) -> tuple[Singles, Bools]:
    vectors, there = value[0].float().cpu(), value[1].cpu()
    return (vectors * there[:, None]).numpy(), there.numpy()


def dense_rows(model: Encoder, batch: Batch, shown: Sequence[int], first: int) -> DenseRows | None:
    """Local features of those of the rows that have both sides; None if the method has none.

    first: number of the batch's first row in the test set.
    """
    dense = model.dense(batch)
    if dense is None:
        return None
    kept = [i for i in shown if bool(dense.present[i])]
    times_PT = dense.times_s[kept].double().cpu().numpy()
    return DenseRows(
        rows_P=np.asarray(kept, dtype=np.int64) + first,
        video_PTSD=dense.video[kept].float().cpu(),
        audio_PAD=dense.audio[kept].float().cpu(),
        valid_PA=dense.audio_valid[kept].cpu(),
        times_PT=times_PT,
        loud_PT=_loud(batch, kept, times_PT),
        grid=(dense.grid[0], dense.grid[1], dense.grid[2]),
    )


def _loud(batch: Batch, rows: Sequence[int], times_PT: Floats) -> Bools:
    """(P, T) time bins in which the row's first audio view can be heard."""
    view = first_view(batch, "audio")
    place = {} if view is None else {int(row): p for p, row in enumerate(view.rows_P)}
    loud = np.zeros(times_PT.shape, dtype=bool)
    for k, row in enumerate(rows):
        if view is None or row not in place:
            continue
        p = place[row]
        wave = view.data[p, : int(view.lengths_P[p])].float().cpu().numpy()
        loud[k] = sounding_bins(wave, view.rate, float(view.start_s_P[p]), times_PT[k])
    return loud


def join_dense(parts: Sequence[DenseRows]) -> DenseRows:
    """Features of several batches as one.

    Raises:
        UserError: clips differ in their grid.
    """
    one_grid("localization", [part.grid for part in parts])
    steps = max(part.audio_PAD.shape[1] for part in parts)
    return DenseRows(
        rows_P=np.concatenate([part.rows_P for part in parts]),
        video_PTSD=torch.cat([part.video_PTSD for part in parts]),
        audio_PAD=torch.cat([pad_steps(part.audio_PAD, steps) for part in parts]),
        valid_PA=torch.cat([pad_steps(part.valid_PA, steps) for part in parts]),
        times_PT=np.concatenate([part.times_PT for part in parts]),
        loud_PT=np.concatenate([part.loud_PT for part in parts]),
        grid=parts[0].grid,
    )
