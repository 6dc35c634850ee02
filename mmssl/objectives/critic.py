"""Mutual information between two views from a critic of pairs, and triplets mined in the batch.

Letters in shapes: P rows of this rank, G rows of all ranks, Q queries, C candidates. Losses are in
nats for the bounds and in squared distances for triplets, fp32 or wider.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.objectives.precision import wide

Bound = Literal["bce", "mine", "nce"]


def critic_loss(
    own_P: Tensor, false_P: Tensor, false_G: Tensor, rows_G: Tensor, bound: Bound
) -> Tensor:
    """(P,) losses whose mean is minus a bound or estimate of the mutual information (LIM, 2019).

    With a critic of zeros: `bce` 2 ln 2, `mine` 0 (Belghazi et al. 2018), `nce` ln(1 + G). Rows may
    have further axes, (P, ...): their places are critics of their own, compared over rows only.

    Args:
        own_P: critic of two views of one recording.
        false_P: critic of a view and one of another recording.
        false_G: the same of all ranks, with gradient.
        rows_G: bool, which of them count.
        bound: `bce`: -ln s(own) - ln s(-false); `mine`: ln mean exp(false) - own; `nce`:
            ln(exp(own) + sum of exp(false)) - own, with the false ones of all rows.
    """
    own_P, false_P = wide(own_P), wide(false_P)
    if bound == "bce":
        return F.softplus(-own_P) + F.softplus(false_P)
    off_G = ~rows_G.reshape(-1, *[1] * (false_G.ndim - 1))
    total = torch.logsumexp(wide(false_G).masked_fill(off_G, -math.inf), 0)
    if bound == "mine":
        return total - rows_G.sum().clamp(min=1).to(total).log() - own_P
    return torch.logaddexp(own_P, total) - own_P


def semi_hard(
    cosines_QC: Tensor, positive_QC: Tensor, valid_QC: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """[d(a, p) - d(a, n) + margin]_+ with the nearest n that is farther than p (FaceNet, 2015).

    d is the squared distance of unit vectors, 2 - 2 cos. Where no n is farther, the farthest one
    serves: constant vectors give the margin, and no query drops out.

    Args:
        cosines_QC: of anchors with candidates.
        positive_QC: bool, one per query.
        valid_QC: bool; valid candidates that are not positive are negatives.
        margin: in squared distances.

    Returns:
        (Q,) losses, 0 where a query lacks either kind; (Q,) bool, whether some n was farther.
    """
    d_QC = 2 - 2 * wide(cosines_QC)
    negative_QC = valid_QC & ~positive_QC
    own_Q = d_QC.where(positive_QC, 0.0).sum(1)
    farther_QC = negative_QC & (d_QC > own_Q[:, None])
    found_Q = farther_QC.any(1)
    nearest_Q = d_QC.masked_fill(~farther_QC, math.inf).argmin(1)
    farthest_Q = d_QC.masked_fill(~negative_QC, -math.inf).argmax(1)
    index_Q = torch.where(found_Q, nearest_Q, farthest_Q)
    excess_Q = own_Q - d_QC.gather(1, index_Q[:, None])[:, 0] + margin
    both_Q = positive_QC.any(1) & negative_QC.any(1)
    return torch.where(both_Q, excess_Q.clamp(min=0), 0.0 * own_Q), found_Q
