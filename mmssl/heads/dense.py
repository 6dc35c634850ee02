"""How a pair's score reads its two sides: one vector per slot, or a map of cells and steps.

Letters: A and C rows of the two sides, B rows, L slots, D width, T time bins, S cells of a bin, U
audio steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mmssl.heads.score import Bilinear, Distance, Dot, ScoreMap
from mmssl.towers import Passes, spread, time_steps
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

    def __init__(self, score: Dot | Bilinear | Distance) -> None:
        super().__init__()
        self.score = score

    def forward(self, a: Parts, b: Parts) -> Tensor:
        """(A, C, L) scores."""
        flat = b[0].flatten(0, 1)
        table: Tensor = self.score(a[0][:, 0], flat)
        return table.reshape(-1, *b[0].shape[:2])


class MapScore(nn.Module):
    """`ScoreMap` with its own LayerNorm + linear projection of video cells and audio steps.

    A spectrogram's bands are averaged into time steps. from_stem: video cells are read before the
    backbone: attention would let a cell answer for an object in another one.
    """

    def __init__(
        self, widths: Mapping[str, int], dim: int, score: ScoreMap, from_stem: bool = False
    ) -> None:
        super().__init__()
        self.from_stem = from_stem
        self.maps_of = nn.ModuleDict(
            {m: nn.Sequential(nn.LayerNorm(w), nn.Linear(w, dim)) for m, w in widths.items()}
        )
        self.score = score

    def embed(self, passes: Passes, view: str) -> tuple[Parts, Tensor]:
        """Side of one view: ((values, valid), filled (B, L)), one row per batch row."""
        tokens = passes.tokens(view)
        modality = tokens.view.modality
        if modality == "video":
            steps = tokens.grid[0]
            values = tokens.stem_PMD if self.from_stem else tokens.x_PND
            cells: Tensor = self.maps_of[modality](values)
            x = cells.reshape(cells.shape[0], steps, -1, cells.shape[-1])
            pad = tokens.stem_pad_PM if self.from_stem else tokens.pad_PN
            valid = ~pad.reshape(cells.shape[0], steps, -1)
        else:
            x, pad = time_steps(tokens, "mean")
            x, valid = self.maps_of[modality](x), ~pad
        parts = spread(x, tokens.view)[:, 0], spread(valid.float(), tokens.view)[:, 0] > 0
        return parts, tokens.view.present_BL

    def forward(self, video: Parts, audio: Parts) -> Tensor:
        """(A, C, 1) scores of A videos with C audio clips."""
        table: Tensor = self.score(video[0], audio[0], video[1], audio[1])
        return table[..., None]

    def features(self, passes: Passes, video: str, audio: str) -> Dense:
        """What localization needs of a batch."""
        (cells, _), seen = self.embed(passes, video)
        (steps, valid), heard = self.embed(passes, audio)
        tokens = passes.tokens(video)
        times = _bin_times(tokens, passes.tower(video).first_centre())
        return Dense(
            cells,
            steps,
            valid,
            seen[:, 0] & heard[:, 0],
            tokens.stem_grid if self.from_stem else tokens.grid,
            spread(times, tokens.view)[:, 0],
        )


def _bin_times(tokens: Tokens, first_centre: float) -> Tensor:
    """(P, T) seconds at the centre of each time bin."""
    place = tokens.view.start_s_P.new_tensor(range(tokens.grid[0])) + first_centre
    return tokens.view.start_s_P[:, None] + place / tokens.rate_hz


PairScore = VectorScore | MapScore
