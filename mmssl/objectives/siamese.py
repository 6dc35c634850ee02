"""Objectives of two views of one row: regression of a target vector, and cross-correlation.

Letters in shapes: B rows of this rank, G rows of all ranks, D width, K entries of a queue.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl import dist
from mmssl.objectives.contrastive import info_nce
from mmssl.objectives.precision import wide

_EPS = 1e-5  # of torch's batch norms


def negative_cosine(prediction_BD: Tensor, target_BD: Tensor) -> Tensor:
    """(B,) -cos; the target is a constant (SimSiam, Chen and He 2021, eq. 1).

    2 + 2 * this is the squared distance of the unit vectors (BYOL, Grill et al. 2020, eq. 2).
    """
    p_BD, t_BD = (F.normalize(wide(x), dim=-1) for x in (prediction_BD, target_BD.detach()))
    return -(p_BD * t_BD).sum(-1)


def queue_nce(
    query_BD: Tensor,
    key_BD: Tensor,
    queue_KD: Tensor,
    temperature: float,
    valid_BK: Tensor | None = None,
) -> Tensor:
    """(B,) InfoNCE of a row's key among the queue's (MoCo, He et al. 2020, eq. 1).

    Keys are constants; other keys of the batch are no negatives. Equal similarities give
    ln(K + 1). In fp32, autocast or not.

    valid_BK: which entries are negatives of a row (default all).
    """
    q_BD = F.normalize(wide(query_BD), dim=-1)
    k_BD = F.normalize(wide(key_BD.detach()), dim=-1)
    own_B1 = (q_BD * k_BD).sum(-1, keepdim=True)
    with torch.autocast(q_BD.device.type, enabled=False):
        others_BK = q_BD @ queue_KD.detach().to(q_BD).T
    scores = torch.cat([own_B1, others_BK], 1) / temperature
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[:, 0] = True
    valid = torch.ones_like(positive)
    if valid_BK is not None:
        valid[:, 1:] = valid_BK
    return info_nce(scores, positive, valid)


def cross_correlation(a_BD: Tensor, b_BD: Tensor, valid_B: Tensor) -> Tensor:
    """(D, D) correlation of the channels of two views over the valid rows of all ranks.

    Both are standardised by their mean and biased variance over these rows, in fp64, and multiplied
    in fp32, autocast or not. The same on every rank, with gradient to the rows of all.
    """
    count = dist.sum_over_ranks(valid_B.sum().double())
    a, b = (_standardised(x, valid_B) for x in (a_BD, b_BD))
    with torch.autocast(a.device.type, enabled=False):
        products_DD = a.T @ b
    return dist.sum_with_gradient(products_DD) / count.clamp(min=1).to(a.dtype)


def redundancy(c_DD: Tensor, off_diagonal: float) -> Tensor:
    """() sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2 (Barlow Twins, 2021, eq. 1)."""
    diagonal_D = c_DD.diagonal()
    rest = c_DD.square().sum() - diagonal_D.square().sum()
    return (1 - diagonal_D).square().sum() + off_diagonal * rest


def _standardised(x_BD: Tensor, valid_B: Tensor) -> Tensor:
    there_B1 = valid_B[:, None]
    x = x_BD.double().where(there_B1, 0.0)
    mean_D, var_D, _ = dist.moments(x, there_B1)
    normed = (x - mean_D) * torch.rsqrt(var_D + _EPS)
    return normed.where(there_B1, 0.0).to(wide(x_BD).dtype)
