"""Spectrogram frames as target, read in an altered form: Mockingjay, TERA, Audio ALBERT.

P items, T frames, F features, N tokens of one or more whole frames, K = frames of a token x F.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl.frontends.patches import cells_of
from mmssl.masking import Altered, FrameAlteration
from mmssl.objectives.precision import wide
from mmssl.targets.base import Seen, Stats, Target
from mmssl.towers import Tower
from mmssl.types import Term, ViewBatch


def frame_head(width: int, hidden: int, cell: int) -> nn.Sequential:
    """That of Mockingjay (Liu et al. 2020): Linear, GELU, LayerNorm, Linear."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, cell)
    )


class FrameTarget(Target):
    """Reconstruct the altered cells from the altered frames by their absolute error.

    head: tokens to the cells that they cover (K), see `frame_head`.
    """

    def __init__(self, name: str, head: nn.Sequential, alter: FrameAlteration) -> None:
        super().__init__()
        self.name, self.head, self.alter = name, head, alter

    @property
    def alters(self) -> bool:
        """Altered frames are read; a mark would be missing outside of pretraining."""
        return True

    def altered(self, tower: Tower, view: ViewBatch, hidden_PN: Tensor) -> Tensor:
        """(P, 1, T, F) frames to read."""
        return self._altered(tower, view).x_PTF[:, None]

    @torch.no_grad()
    def _altered(self, tower: Tower, view: ViewBatch) -> Altered:
        """A pure function of the rows' seeds: the loss asks for the same alteration again."""
        frames_PTF = tower.inputs(view)[:, 0]
        return self.alter(frames_PTF, tower.frames(view), view.seeds_P, self.name)

    def forward(self, seen: Seen) -> dict[str, Term]:
        """Mean absolute error per altered cell."""
        error_PNK, cells_PNK = self._errors(seen)
        total = torch.where(cells_PNK, error_PNK, torch.zeros_like(error_PNK)).sum()
        return {"": Term(total, cells_PNK.sum().to(total.dtype))}

    def _errors(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """|prediction - truth| of all cells, and which of them count."""
        grid, cell = seen.tokens.grid, seen.tower.cell
        truth_PNK = cells_of(seen.tower.inputs(seen.view).detach(), grid, cell)
        loss_PTF = self._altered(seen.tower, seen.view).loss_PTF
        cells_PNK = cells_of(loss_PTF[:, None].float(), grid, cell) > 0
        present_PN = seen.hidden_PN[..., None]  # a dummy item counts nowhere
        error = (wide(self.head(seen.tokens.x_PND)) - truth_PNK).abs()
        return error, cells_PNK & present_PN

    def stats(self, seen: Seen) -> Stats:
        """Absolute error, and that of predicting 0, the mean of normalised features."""
        error_PNK, cells_PNK = self._errors(seen)
        truth = cells_of(seen.tower.inputs(seen.view), seen.tokens.grid, seen.tower.cell)
        return {
            "error_sum": error_PNK[cells_PNK].double().sum().reshape(1),
            "baseline_sum": truth[cells_PNK].double().abs().sum().reshape(1),
            "count": cells_PNK.sum().double().reshape(1),
        }
