"""How a pair's score reads its two sides: one vector per slot, or a map of cells and steps.

Letters: A and C rows of the two sides, B rows, L slots, D width, T time bins, S cells of a bin, U
audio steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mmssl.heads.embed import pool
from mmssl.heads.project import Head
from mmssl.heads.score import Bilinear, Distance, Dot, FusionMLP, ScoreMap
from mmssl.objectives.dense import PENALTIES
from mmssl.towers import Passes, item_weight, spread, time_steps
from mmssl.types import Tokens

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Dense:
    """Projected cells and steps of a batch, for localization.

    video (B, T, S, D); audio (B, U, D) with audio_valid (B, U); present (B,): the row has both.
    grid (T, H, W); times_s (B, T): the centre of each time bin on the clip's clock.
    """

    video: Tensor
    audio: Tensor
    audio_valid: Tensor
    present: Tensor
    grid: tuple[int, ...]
    times_s: Tensor


class VectorScore(nn.Module):
    """Adapts a score of vectors to sides with slots: a (A, 1, D) and b (C, L, D)."""

    def __init__(self, score: Dot | Bilinear | Distance | FusionMLP) -> None:
        super().__init__()
        self.score = score

    def forward(self, a: Parts, b: Parts) -> Tensor:
        """(A, C, L) scores."""
        flat = b[0].flatten(0, 1)
        table: Tensor = self.score(a[0][:, 0], flat)
        return table.reshape(-1, *b[0].shape[:2])

    def pairs(self, a: Parts, b: Parts) -> Tensor:
        """(A,) scores of a (A, 1, D) with b (A, 1, D), row by row."""
        return self.score.pairs(a[0][:, 0], b[0][:, 0])


class StepScore(VectorScore):
    """A side's vector is that of `steps` steps, each of which is compared by itself."""

    def __init__(self, score: FusionMLP, steps: int) -> None:
        super().__init__(score)
        self.steps = steps

    def pairs(self, a: Parts, b: Parts) -> Tensor:
        """(A, steps) scores of a (A, 1, steps * D) with b, step by step."""
        left, right = (x[0].reshape(len(x[0]) * self.steps, -1) for x in (a, b))
        return self.score.pairs(left, right).reshape(-1, self.steps)


class MapScore(nn.Module):
    """`ScoreMap` with its own projections of video cells and of the query.

    The query is audio or text. `steps`: it is compared step by step, a spectrogram's bands averaged
    into time steps. Any other pooling makes one vector of the whole query, which every instant is
    compared with. forms: of the projections by modality, as in `project`; else LayerNorm + linear
    for cells and steps, linear for cells whose length counts, batch norm + linear for a pooled
    query, since pooled vectors of different clips begin almost parallel. from_stem: video cells are
    read before the backbone: attention would let a cell answer for an object in another one.
    by_motion: they are scaled by the motion inside them, as the receptive field of a cell reaches
    beyond it.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        dim: int,
        score: ScoreMap,
        from_stem: bool = False,
        query: str = "steps",
        by_motion: bool = False,
        forms: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.from_stem, self.query, self.score = from_stem, query, score
        self.by_motion = by_motion
        of_query = "norm_linear" if query == "steps" else "bn_linear"
        of_cells = "norm_linear" if score.normalize == "both" else "linear"
        usual = {m: of_cells if m == "video" else of_query for m in widths} | dict(forms or {})
        self.maps_of = nn.ModuleDict({m: Head(usual[m], w, dim) for m, w in widths.items()})

    def embed(self, passes: Passes, view: str) -> tuple[Parts, Tensor]:
        """Side of one view: ((values, valid), filled (B, L)), one row per batch row."""
        tokens = passes.tokens(view)
        x, valid = (self._cells if tokens.view.modality == "video" else self._query)(tokens)
        parts = spread(x, tokens.view)[:, 0], spread(valid.float(), tokens.view)[:, 0] > 0
        return parts, tokens.view.present_BL

    def _cells(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(P, T, S, D) projected cells and which of them are valid."""
        values = tokens.stem_PMD if self.from_stem else tokens.x_PND
        pad = tokens.stem_pad_PM if self.from_stem else tokens.pad_PN
        shape = (len(values), self._grid(tokens)[0], -1)
        there = ~pad & (item_weight(tokens.view) > 0)[:, None]
        cells: Tensor = self.maps_of["video"](values, there)
        if self.by_motion:
            assert tokens.motion_PM is not None  # `build` refuses other front-ends
            cells = cells * tokens.motion_PM[..., None]
        return cells.reshape(*shape, cells.shape[-1]), ~pad.reshape(shape)

    def _query(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(P, U, D) projected steps, one if the query is pooled, and which of them are valid."""
        head = self.maps_of[tokens.view.modality]
        there = item_weight(tokens.view) > 0
        if self.query == "steps":
            x, pad = time_steps(tokens, "mean")
            return head(x, ~pad & there[:, None]), ~pad
        return head(pool(tokens, self.query), there)[:, None], there[:, None]

    def _grid(self, tokens: Tokens) -> tuple[int, ...]:
        return tokens.stem_grid if self.from_stem else tokens.grid

    def forward(self, video: Parts, query: Parts) -> Tensor:
        """(A, C, 1) scores of A videos with C queries."""
        table: Tensor = self.score(video[0], query[0], video[1], query[1])
        return table[..., None]

    def pairs(self, video: Parts, query: Parts, background: bool = False) -> Tensor:
        """(A,) scores of A videos with a query each; `background` as in `ScoreMap.pairs`."""
        return self.score.pairs(video[0], query[0], video[1], query[1], background=background)

    def penalties(self, video: Parts, query: Parts, names: Sequence[str]) -> dict[str, Tensor]:
        """{name: (A,)} penalties on the similarities of A videos with a query each."""
        sims, steps = self.score.by_head(video[0], query[0], query[1])
        cells = video[1] if self.score.aligned else video[1].flatten(1)[:, None]
        valid = cells if steps is None else cells & steps[..., None]
        return {n: PENALTIES[n](sims, valid.expand(sims.shape[:3])) for n in names}

    def features(self, passes: Passes, video: str, audio: str) -> Dense:
        """What localization needs of a batch."""
        (cells, _), seen = self.embed(passes, video)
        (steps, valid), heard = self.embed(passes, audio)
        tokens = passes.tokens(video)
        grid = self._grid(tokens)
        per_bin = 1.0 if self.from_stem else tokens.stem_rate_hz / tokens.rate_hz
        times = bin_times(tokens, grid[0], per_bin, passes.tower(video).first_centre())
        return Dense(
            cells,
            steps,
            valid,
            seen[:, 0] & heard[:, 0],
            grid,
            spread(times, tokens.view)[:, 0],
        )


def bin_times(tokens: Tokens, bins: int, per_bin: float, first_centre: float) -> Tensor:
    """(P, T) seconds at the centre of each of the bins.

    per_bin: stem cells along time of one bin; first_centre: of the first stem cell, in cells.
    """
    place = tokens.view.start_s_P.new_tensor(range(bins)) * per_bin + (per_bin - 1) / 2
    return tokens.view.start_s_P[:, None] + (place + first_centre) / tokens.stem_rate_hz


PairScore = VectorScore | MapScore
