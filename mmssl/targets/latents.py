"""Latents of a teacher that sees everything as target: data2vec.

P items, N tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.backbones.transformer import Transformer
from mmssl.heads.predict import TokenHead
from mmssl.masking import IdAlteration
from mmssl.objectives.precision import wide
from mmssl.specs import Number
from mmssl.targets.base import Seen, Stats, Target
from mmssl.targets.teacher import Teacher, evaluating
from mmssl.types import Floor, Term

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Norm = Literal["instance", "layer"]

_EPS = 1e-5
_WATCHED = 512  # tokens of a step whose rank is measured
_REMEDY = "raise `target.decay` of the task, or lower `optim.lr`"

# What tells a collapse. Two statistics of the targets: the released code of data2vec stops below a
# `target_std` of 0.1 (`min_target_var`), but a norm of each channel hides small deviations; an
# effective rank of 1 is a line, where speech against silence gives healthy runs on short words 1.7
# to 2. And its cause: without a lag of the teacher nothing keeps the targets from following the
# student (BYOL, Grill et al. 2020: a decay of 0 collapses, 0.9 and more do not); a distance below
# the resolution of fp32 is none.
_FLOORS = {
    "target_std": Floor(0.1, "the variety of the teacher's targets", _REMEDY),
    "targets": Floor(1.1, "the rank of the teacher's targets", _REMEDY),
    "teacher_lag": Floor(1e-7, "the distance between teacher and student", _REMEDY),
}


class LatentTarget(Target):
    """Regress the mean of a teacher's top layers (Baevski et al. 2022).

    The teacher is the moving average of the backbone alone; it reads what the student's own
    front-end and positions make of the whole view, in evaluation mode and without gradient.

    layers: so many top layers are averaged. tap: what is read of a layer (`Transformer.forward`).
    ids: how a text is altered for the student.

    norm: of each layer before the average, without parameters: `instance` over the valid tokens of
    a row, each channel by itself, or `layer` over the channels of a token; `again` norms the
    average over its channels, too. Watched: `target_std` and `prediction_std` over the hidden
    tokens of this rank, the rank of the targets, and `teacher_lag` (`Teacher.lag`).
    """

    weights: ClassVar = {"target_std": 0.0, "prediction_std": 0.0, "teacher_lag": 0.0}
    floors: ClassVar = _FLOORS

    def __init__(
        self,
        head: TokenHead,
        trunk: Transformer,
        decay: Number,
        layers: int,
        tap: Literal["layer", "ffn"],
        norm: Norm,
        again: bool,
        loss: Loss,
        ids: IdAlteration | None = None,
    ) -> None:
        super().__init__()
        self.ids = ids
        self.head, self.teacher = head, Teacher(trunk, decay)
        self.layers, self.tap, self.norm, self.again, self.loss = layers, tap, norm, again, loss

    def forward(self, seen: Seen) -> dict[str, Term]:
        """The error of the hidden tokens, and what the monitors watch."""
        prediction = self.head(seen.tokens, seen.hidden_PN)
        truth = self.truth(seen)
        total, count = self.loss(prediction, truth, seen.hidden_PN)
        hidden_HD = truth[seen.hidden_PN]
        self.last = {"targets": hidden_HD[:: max(1, len(hidden_HD) // _WATCHED)]}
        return {
            "": Term(total, count),
            "target_std": _spread(hidden_HD, count),
            "prediction_std": _spread(prediction[seen.hidden_PN], count),
            "teacher_lag": Term(self.teacher.lag.to(count) * count, count),
        }

    @torch.no_grad()
    def truth(self, seen: Seen) -> Tensor:
        """(P, N, D) targets of all tokens."""
        tower, trunk = seen.tower, self.teacher.twin
        with evaluating(tower):
            entry = tower.unmasked(seen.view, seen.tokens, seen.altered is not None)
            x, pad = tower.extra(entry.x_PND, entry.pad_PN, tower.extra.names)
        _, hidden = trunk(x, pad, modality=tower.modality, return_hidden=True, tap=self.tap)
        valid_PN = ~seen.tokens.pad_PN if entry.pad_PN is None else ~entry.pad_PN
        front = tower.extra.count(tower.extra.names)
        total = torch.zeros_like(entry.x_PND, dtype=torch.float32)
        for x_PMD in hidden[-self.layers :]:
            total = total + self._normed(wide(x_PMD[:, front:]), valid_PN)
        mean = total / min(self.layers, len(hidden))
        return F.layer_norm(mean, mean.shape[-1:], eps=_EPS) if self.again else mean

    def _normed(self, x_PND: Tensor, valid_PN: Tensor) -> Tensor:
        if self.norm == "layer":
            return F.layer_norm(x_PND, x_PND.shape[-1:], eps=_EPS)
        weight_PN1 = valid_PN[..., None].to(x_PND.dtype)
        count_P11 = weight_PN1.sum(1, keepdim=True).clamp(min=1)
        centred = x_PND - (x_PND * weight_PN1).sum(1, keepdim=True) / count_P11
        variance = (centred.square() * weight_PN1).sum(1, keepdim=True) / count_P11
        return centred * (variance + _EPS).rsqrt()

    def stats(self, seen: Seen) -> Stats:
        """Squared error, and that of the mean target."""
        truth = self.truth(seen)[seen.hidden_PN].double()
        prediction = self.head(seen.tokens, seen.hidden_PN)[seen.hidden_PN].double()
        return {
            "error_sum": (prediction - truth).square().sum().reshape(1),
            "count": truth.new_tensor([truth.numel()]),
            "target_sum": truth.sum(0),
            "square_sum": truth.square().sum().reshape(1),
            "cells": truth.new_tensor([truth.shape[0]]),
        }

    def after_step(self, position: float) -> None:
        """Let the teacher follow."""
        self.teacher.update(position)


@torch.no_grad()
def _spread(x_HD: Tensor, count: Tensor) -> Term:
    """Mean over channels of the standard deviation over tokens, counted once per token."""
    rows = wide(x_HD)
    std = rows.std(0, correction=0).mean() if len(rows) else rows.new_zeros(())
    return Term(std * count, count)
