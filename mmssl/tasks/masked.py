"""`masked`: hide a part of the input, encode, predict what was hidden.

Targets are objects: each says what is read instead of the hidden input, what is predicted and how
far off it is; the task does not ask which one it has.
Letters: P items, N tokens, K numbers in an input cell, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmssl.frontends.patches import cells_of
from mmssl.masking import RULES, corrupt_tokens
from mmssl.objectives.classification import token_cross_entropy
from mmssl.objectives.regression import mean_square, patch_normalise, smooth_l1
from mmssl.rng import row_uniform
from mmssl.schedules import resolve
from mmssl.specs import MaskSpec, Number
from mmssl.tasks.base import Task
from mmssl.towers import Mask, Passes, Tower, item_weight
from mmssl.types import Batch, Term, ViewBatch

Stats = dict[str, Tensor]


class Target(Protocol):
    """What a masked task predicts."""

    width: int  # numbers predicted per token
    reads_ids: bool  # hidden ids are replaced in the input; else hidden cells are zeroed

    def values(self, tower: Tower, view: ViewBatch) -> Tensor:
        """The truth of every token, (P, N, K) or (P, N)."""

    def candidates(self, view: ViewBatch) -> Tensor | None:
        """(P, N) tokens that may be hidden; None = all but padding."""

    def replacement(self, view: ViewBatch, hidden_PN: Tensor) -> Tensor | None:
        """(P, N) ids to read instead; None where the input is a signal whose cells are zeroed."""

    def loss(self, prediction: Tensor, truth: Tensor, hidden_PN: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) over the hidden tokens."""

    def stats(self, prediction: Tensor, truth: Tensor, hidden_PN: Tensor) -> Stats:
        """Sums that evaluation adds up over batches."""


class PatchTarget:
    """The input cells (MAE, VideoMAE, spectrogram MAE), optionally standardised one by one."""

    def __init__(self, width: int, normalize: bool, loss: str) -> None:
        self.width, self.normalize, self.reads_ids = width, normalize, False
        self._loss = {"mse": mean_square, "smooth_l1": smooth_l1}[loss]

    def values(self, tower: Tower, view: ViewBatch) -> Tensor:
        """Input cells of every token."""
        with torch.no_grad():
            signal = tower.inputs(view)
            cells = cells_of(signal, tower.grid_of(view.data.shape[1:]), tower.cell)
            return patch_normalise(cells) if self.normalize else cells

    def candidates(self, view: ViewBatch) -> Tensor | None:
        """All cells may be hidden."""
        return None

    def replacement(self, view: ViewBatch, hidden_PN: Tensor) -> Tensor | None:
        """Signals are zeroed, not replaced."""
        return None

    def loss(self, prediction: Tensor, truth: Tensor, hidden_PN: Tensor) -> tuple[Tensor, Tensor]:
        """Mean error per hidden cell."""
        return self._loss(prediction, truth, hidden_PN)

    def stats(self, prediction: Tensor, truth: Tensor, hidden_PN: Tensor) -> Stats:
        """Squared error, and what the error of the mean cell needs."""
        hidden = truth[hidden_PN].double()
        error = (prediction[hidden_PN].double() - hidden).square().sum()
        return {
            "error_sum": error.reshape(1),
            "count": hidden.new_tensor([hidden.numel()]),
            "target_sum": hidden.sum(0),
            "square_sum": hidden.square().sum().reshape(1),
            "cells": hidden.new_tensor([hidden.shape[0]]),
        }


class IdTarget:
    """The ids of a text (BERT); the hidden ones are replaced as MaskSpec.shares says."""

    def __init__(
        self, vocabulary: int, special: dict[str, int], shares: tuple[float, float]
    ) -> None:
        self.width, self.shares, self.mask_id = vocabulary, shares, special["mask"]
        self.reads_ids = True
        self.special = sorted(special.values())

    def values(self, tower: Tower, view: ViewBatch) -> Tensor:
        """The ids themselves."""
        return view.data

    def candidates(self, view: ViewBatch) -> Tensor | None:
        """Everything but special pieces."""
        return ~torch.isin(view.data, torch.tensor(self.special, device=view.data.device))

    def replacement(self, view: ViewBatch, hidden_PN: Tensor) -> Tensor | None:
        """80 % mask, 10 % random id, 10 % kept, unless configured otherwise."""
        ordinary = (max(self.special) + 1, self.width)
        return corrupt_tokens(
            view.data, hidden_PN, view.seeds_P, self.mask_id, ordinary, self.shares
        )

    def loss(self, prediction: Tensor, truth: Tensor, hidden_PN: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy per hidden token."""
        return token_cross_entropy(prediction, truth, hidden_PN)

    def stats(self, prediction: Tensor, truth: Tensor, hidden_PN: Tensor) -> Stats:
        """Hits, and the histogram that the unigram baseline needs."""
        ids = truth[hidden_PN]
        hits = (prediction[hidden_PN].argmax(-1) == ids).sum()
        histogram = torch.bincount(ids, minlength=self.width).double()
        return {
            "correct": hits.double().reshape(1),
            "count": histogram.sum().reshape(1),
            "histogram": histogram,
        }


class Masked(Task):
    """Masked prediction on one view. Owns the mask embedding and the prediction head.

    widths: of the tokens behind the stem and behind the tower.
    """

    def __init__(
        self,
        name: str,
        view: str,
        widths: tuple[int, int],
        target: Target,
        mask: MaskSpec,
        hidden: int,
        rows: float,
        weight: Number,
    ) -> None:
        super().__init__(weight)
        self.name, self.view, self.mask, self.rows = name, view, mask, rows
        self.target = target
        stem_width, width = widths
        self.embedding = None if target.reads_ids else nn.Parameter(torch.randn(stem_width) * 0.02)
        layers = [nn.Linear(width, hidden), nn.GELU()] if hidden else []
        self.head = nn.Sequential(*layers, nn.Linear(hidden or width, target.width))

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """One term: the target's loss over the hidden tokens."""
        return {"": Term(*self.target.loss(*self._predict(passes, batch)))}

    def stats(self, passes: Passes, batch: Batch) -> Stats:
        """Sums for evaluation."""
        return self.target.stats(*self._predict(passes, batch))

    def _predict(self, passes: Passes, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        tower = passes.tower(self.view)
        assert isinstance(tower, Tower)  # `build` refuses other towers
        view = self._rows(batch.views[self.view]) if self.training else batch.views[self.view]
        hidden = self._hidden(tower, view, passes.position)
        ids = self.target.replacement(view, hidden)
        tokens = passes.tokens(self.view, Mask(self.name, hidden, self.embedding, ids), view)
        # A token that DropToken left out has no output to predict from.
        counted = hidden & ~tokens.pad_PN & (item_weight(view) > 0)[:, None]
        return self.head(tokens.x_PND), self.target.values(tower, view), counted

    def _rows(self, view: ViewBatch) -> ViewBatch:
        """The items that take part in this step, chosen by their own seeds."""
        if self.rows == 1.0:
            return view
        return keep_items(view, row_uniform(view.seeds_P, 1, f"{self.name}/rows")[:, 0] < self.rows)

    def _hidden(self, tower: Tower, view: ViewBatch, position: float) -> Tensor:
        grid = tower.grid_of(view.data.shape[1:])
        pad = tower.padding(view, grid)
        valid = self.target.candidates(view)
        if pad is not None:
            valid = ~pad if valid is None else valid & ~pad
        options = _mask_options(self.mask, position)
        rule = RULES[self.mask.rule]
        return rule(view.seeds_P, grid, valid_PN=valid, stream=self.name, **options)


def _mask_options(spec: MaskSpec, position: float) -> dict[str, Any]:
    """The constants that a rule takes."""
    if spec.rule == "spans":
        return {"start_prob": spec.start_prob, "length": spec.length}
    ratio = {"ratio": resolve(spec.ratio, position)}
    if spec.rule == "blocks":
        return {**ratio, "block": spec.block, "inverse": spec.inverse}
    return ratio


def keep_items(view: ViewBatch, keep_P: Tensor) -> ViewBatch:
    """The marked items of a view; its first item as a dummy when none is marked."""
    keep_P = keep_P & (item_weight(view) > 0)
    dummy = not bool(keep_P.any())
    index = (
        torch.zeros(1, dtype=torch.long, device=keep_P.device) if dummy else keep_P.nonzero()[:, 0]
    )
    present = torch.zeros_like(view.present_BL)
    if not dummy:
        present[view.rows_P[index], view.slots_P[index]] = True
    columns = {
        name: getattr(view, name)[index]
        for name in ("data", "lengths_P", "rows_P", "slots_P", "seeds_P", "start_s_P")
    }
    return replace(view, **columns, present_BL=present, dummy=dummy)
