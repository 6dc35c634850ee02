"""The hidden input cells as target: MAE, VideoMAE, spectrogram MAE.

P items, N tokens, K numbers in an input cell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.frontends.patches import cells_of
from mmssl.heads.predict import PatchDecoder, TokenHead
from mmssl.objectives.regression import mean_square, patch_normalise, smooth_l1
from mmssl.targets.base import Seen, Stats, Target
from mmssl.towers import Tower
from mmssl.types import Term, ViewBatch

LOSSES = {"mse": mean_square, "smooth_l1": smooth_l1}


class PatchTarget(Target):
    """Regress the cells (K numbers), standardised one by one if asked (He et al. 2022)."""

    def __init__(self, head: TokenHead | PatchDecoder, normalize: bool, loss: str) -> None:
        super().__init__()
        self.head = head
        self.normalize, self.error = normalize, LOSSES[loss]

    def forward(self, seen: Seen) -> dict[str, Term]:
        """Mean error per hidden cell."""
        prediction = self.head(seen.tokens, seen.hidden_PN)
        truth = self.truth(seen.tower, seen.view)
        return {"": Term(*self.error(prediction, truth, seen.hidden_PN))}

    @torch.no_grad()
    def truth(self, tower: Tower, view: ViewBatch) -> Tensor:
        """(P, N, K) input cells of all tokens."""
        grid = tower.grid_of(view.data.shape[1:])
        cells = cells_of(tower.inputs(view), grid, tower.cell)
        return patch_normalise(cells) if self.normalize else cells

    def stats(self, seen: Seen) -> Stats:
        """Squared error, and what the error of the mean cell needs."""
        hidden = self.truth(seen.tower, seen.view)[seen.hidden_PN].double()
        prediction = self.head(seen.tokens, seen.hidden_PN)[seen.hidden_PN].double()
        return {
            "error_sum": (prediction - hidden).square().sum().reshape(1),
            "count": hidden.new_tensor([hidden.numel()]),
            "target_sum": hidden.sum(0),
            "square_sum": hidden.square().sum().reshape(1),
            "cells": hidden.new_tensor([hidden.shape[0]]),
        }
