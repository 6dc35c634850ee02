"""Regression of vectors at masked places, as (sum, count) over positions.

Letters in shapes: P rows, N positions, D values of a position. The error of a position is the mean
over its D values, so that a constant prediction of standardised targets scores 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.objectives.precision import wide


def mean_square(
    prediction_PND: Tensor, target_PND: Tensor, mask_PN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the mean squared error over the marked positions (default all).

    Positions that are not marked send no gradient, whatever they hold. The target is a constant.
    """
    return _reduce(F.mse_loss, prediction_PND, target_PND, mask_PN)


def smooth_l1(
    prediction_PND: Tensor, target_PND: Tensor, mask_PN: Tensor | None = None, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the smooth L1 error: quadratic / beta below `beta`, linear above."""

    def error(prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.smooth_l1_loss(prediction, target, reduction=reduction, beta=beta)

    return _reduce(error, prediction_PND, target_PND, mask_PN)


def patch_normalise(target_PND: Tensor, eps: float = 1e-6) -> Tensor:
    """Standardise each position's D values: (x - mean) / sqrt(variance + eps), variance unbiased.

    The normalised pixels of MAE (He et al. 2022, section 4.1).
    """
    wide_PND = wide(target_PND)
    mean_PN1 = wide_PND.mean(-1, keepdim=True)
    var_PN1 = wide_PND.var(-1, keepdim=True)
    return (wide_PND - mean_PN1) / (var_PN1 + eps).sqrt()


def _reduce(
    error: Callable[..., Tensor], prediction: Tensor, target: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if prediction.shape != target.shape:
        raise ValueError(
            f"regression: prediction {tuple(prediction.shape)} and target {tuple(target.shape)} "
            "differ in shape"
        )
    prediction, target = wide(prediction), wide(target).detach()
    if mask is None:
        mask = torch.ones(prediction.shape[:-1], dtype=torch.bool, device=prediction.device)
    # Both sides are blanked before the error, so that not even NaN at hidden places has a gradient.
    blank = torch.zeros((), dtype=prediction.dtype, device=prediction.device)
    prediction = torch.where(mask[..., None], prediction, blank)
    target = torch.where(mask[..., None], target.to(prediction.dtype), blank)
    total = error(prediction, target, reduction="none").mean(-1).sum()
    return total, mask.sum().to(total.dtype)
