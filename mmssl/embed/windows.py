"""Cuts media of any length into the windows a model reads, with the views of its evaluation.

Letters in shapes: T frames, D width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from mmssl.data.collate import Item, collate
from mmssl.data.text import Tokenizer
from mmssl.embed.media import Reader, opened
from mmssl.embed.sources import Row
from mmssl.specs import ViewSpec
from mmssl.types import Batch, UserError, View
from mmssl.views import clip as cutting
from mmssl.views.plan import Cut, passes

OPEN_WINDOW_S = 10.0  # window of views that take whole clips
_STEP_S = 1.0  # short ones are padded to a multiple of it, so that they share batches
_AT_ONCE = 16  # windows of one decoding pass


@dataclass(frozen=True)
class Piece:
    """One view of one window of an item; `padded_s`: what it is padded to, 0 for text.

    `data.start_s` is 0, `start_s` that of the window on the item's clock.
    """

    item: int
    view: str
    start_s: float
    end_s: float
    padded_s: float
    data: View


def window_starts(duration_s: float, window_s: float, hop_s: float = 0.0) -> list[float]:
    """Starts (s) of windows every `hop_s` (0 = `window_s`); the last one ends with the media."""
    if duration_s <= window_s:
        return [0.0]
    room, hop = duration_s - window_s, hop_s or window_s
    count = math.ceil(room / hop - 1e-9)
    return [*(k * hop for k in range(count)), room]


@dataclass(frozen=True)
class Cutter:
    """Turns rows into pieces.

    views: those that are wanted, by name. loose: of these, whose windows need no padding to their
    full length. hop_s: 0 = as long as each view's window.
    """

    views: Mapping[str, ViewSpec]
    tokenizer: Tokenizer | None
    loose: Collection[str] = ()
    hop_s: float = 0.0

    def pieces(self, item: int, row: Row) -> Iterator[Piece]:
        """All windows of an item, by time; its text is one.

        Raises:
            UserError: something cannot be read, see `opened`; or frames smaller than the view's.
        """
        if "text" in row.sources:
            yield from self._texts(item, row)
        known = {spec.modality for spec in self.views.values()}
        with opened(row, sorted(known)) as readers:
            for reader, wanted in readers:
                yield from self._windows(item, row, reader, wanted)

    def _texts(self, item: int, row: Row) -> Iterator[Piece]:
        for name, spec in self.views.items():
            if spec.modality == "text":
                assert self.tokenizer is not None  # no view of text is usable without
                cut = Cut(name, spec, 0.0, 0.0, seed=0)
                found = cutting.cut_text([str(row.sources["text"])], cut, self.tokenizer)
                yield from (Piece(item, name, 0.0, 0.0, 0.0, view) for view in found)

    def _windows(
        self, item: int, row: Row, reader: Reader, wanted: frozenset[str]
    ) -> Iterator[Piece]:
        if reader.duration_s <= 0:
            raise UserError(f"{row.name}: is empty")
        planned = self._planned(reader.duration_s, wanted)
        for first in range(0, len(planned), _AT_ONCE):
            some = planned[first : first + _AT_ONCE]
            cuts = {str(k): replace(cut, name=str(k)) for k, cut in enumerate(some)}
            needs, pass_of = passes(cuts)
            clips = [reader.clip(need) for need in needs]
            for key, cut in cuts.items():
                cutter = cutting.cut_audio if cut.spec.modality == "audio" else cutting.cut_video
                try:
                    view = cutter(clips[pass_of[key]], cut, training=False)
                except UserError as error:
                    raise UserError(f"{row.name}, {cut.spec.modality}: {error}") from error
                assert view is not None  # the reader has the modality
                data = replace(view, start_s=0.0)
                name = some[int(key)].name
                padded_s = self._padded_s(name, cut)
                yield Piece(item, name, cut.start_s, cut.end_s, padded_s, data)

    def _planned(self, duration_s: float, wanted: frozenset[str]) -> list[Cut]:
        """The cuts of an item by time."""
        cuts = []
        for name, spec in self.views.items():
            window_s = spec.crop_s or OPEN_WINDOW_S
            for start_s in window_starts(duration_s, window_s, self.hop_s):
                if spec.modality in wanted:
                    end_s = min(duration_s, start_s + window_s)
                    cuts.append(Cut(name, spec, start_s, end_s, seed=0))
        return sorted(cuts, key=lambda cut: cut.start_s)

    def _padded_s(self, name: str, cut: Cut) -> float:
        """A length that the window alone decides, or its vector would depend on its neighbours'."""
        needed_s = math.ceil((cut.end_s - cut.start_s) / _STEP_S - 1e-6) * _STEP_S
        if not cut.spec.crop_s:
            return needed_s
        return min(cut.spec.crop_s, needed_s) if name in self.loose else cut.spec.crop_s


def batched(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces of one view and one padded length together, in their order."""
    waiting: dict[tuple[str, float], list[Piece]] = {}
    for piece in pieces:
        group = waiting.setdefault((piece.view, piece.padded_s), [])
        group.append(piece)
        if len(group) == size:
            yield waiting.pop((piece.view, piece.padded_s))
    yield from waiting.values()


def collated(pieces: Sequence[Piece], spec: ViewSpec) -> Batch:
    """The batch of pieces of one view and one padded length."""
    first = pieces[0]
    padded = {"crop_s": first.padded_s} if first.padded_s else {}
    items = [Item(str(p.item), str(p.item), 0, [], {p.view: [p.data]}) for p in pieces]
    return collate(items, {first.view: spec.model_copy(update=padded)})


def joined(
    parts: Sequence[tuple[Piece, list[Tensor], Tensor]],
) -> tuple[list[Tensor], Tensor]:
    """Layers (T, D) and times (T,) of consecutive windows in one.

    Overlaps are shared out at their middles: there the edge of either window is equally far.
    """
    pieces = [piece for piece, _, _ in parts]
    borders = [(a.end_s + b.start_s) / 2 for a, b in pairwise(pieces)]
    lows, highs = [-torch.inf, *borders], [*borders, torch.inf]
    kept = [
        (times_T >= low) & (times_T < high)
        for (_, _, times_T), low, high in zip(parts, lows, highs, strict=True)
    ]
    layers = zip(*(found for _, found, _ in parts), strict=True)
    joined = [torch.cat([x[k] for x, k in zip(each, kept, strict=True)]) for each in layers]
    return joined, torch.cat([t[k] for (_, _, t), k in zip(parts, kept, strict=True)])
