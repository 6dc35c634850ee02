"""Regression of vectors at masked places, as (sum, count) over positions.

Letters in shapes: P rows, N positions, D values of a position. Unless said otherwise the error of a
position is the mean over its D values, so that a constant prediction of standardised targets scores
1 in squares. The target is a constant; positions that are not marked send no gradient, whatever
they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.objectives.precision import wide


def mean_square(
    prediction_PND: Tensor, target_PND: Tensor, mask_PN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the mean squared error over the marked positions (default all)."""
    return _reduce(F.mse_loss, prediction_PND, target_PND, mask_PN)


def scaled_square(
    prediction_PND: Tensor, target_PND: Tensor, mask_PN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the squared error, summed over D and divided by sqrt(D).

    data2vec audio (Baevski et al. 2022, released code): sqrt(D) where standardised targets are
    predicted as 0.
    """
    factor = math.sqrt(prediction_PND.shape[-1])
    return _reduce(F.mse_loss, prediction_PND, target_PND, mask_PN, factor)


def mean_absolute(
    prediction_PND: Tensor, target_PND: Tensor, mask_PN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the mean absolute error over the marked positions (default all)."""
    return _reduce(F.l1_loss, prediction_PND, target_PND, mask_PN)


def smooth_l1(
    prediction_PND: Tensor,
    target_PND: Tensor,
    mask_PN: Tensor | None = None,
    beta: float = 1.0,
    summed: bool = False,
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the smooth L1 error: quadratic / beta below `beta`, linear above.

    data2vec (Baevski et al. 2022): beta 2 for images; beta 4 and `summed`, the sum over
    the D values instead of their mean, for text.
    """

    def error(prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.smooth_l1_loss(prediction, target, reduction=reduction, beta=beta)

    factor = float(prediction_PND.shape[-1]) if summed else 1.0
    return _reduce(error, prediction_PND, target_PND, mask_PN, factor)


def patch_normalise(target_PND: Tensor, eps: float = 1e-6) -> Tensor:
    """Standardise each position's D values: (x - mean) / sqrt(variance + eps), variance unbiased.

    The normalised pixels of MAE (He et al. 2022, section 4.1).
    """
    wide_PND = wide(target_PND)
    mean_PN1 = wide_PND.mean(-1, keepdim=True)
    var_PN1 = wide_PND.var(-1, keepdim=True)
    return (wide_PND - mean_PN1) / (var_PN1 + eps).sqrt()


def _reduce(
    error: Callable[..., Tensor],
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`factor` times the mean over D, summed over the marked positions."""
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
    if factor != 1.0:
        total = total * factor
    return total, mask.sum().to(total.dtype)
