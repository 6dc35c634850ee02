"""Balanced assignments to prototypes, and their prediction from another view (SwAV).

Letters in shapes: B rows, K prototypes. All is computed in fp32 or wider: exp(1 / 0.05) is no
number in fp16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.objectives.precision import wide


@torch.no_grad()
def sinkhorn(
    scores_BK: Tensor, epsilon: float = 0.05, iterations: int = 3, valid_B: Tensor | None = None
) -> Tensor:
    """(B, K) soft assignments that use all prototypes about equally; constants, rows sum to 1.

    Sinkhorn-Knopp iterations on exp(scores / epsilon) in the log domain: every prototype gets the
    same mass, then every row (Caron et al. 2020, section 3.1; Cuturi 2013). They end with the rows,
    so that the prototypes are only as even as the iterations made them.

    Args:
        scores_BK: cosines of the rows of all ranks with the prototypes.
        epsilon: regularisation; small values give hard assignments.
        iterations: of both normalisations.
        valid_B: bool, default all; other rows take no part and come out as zeros.
    """
    log_BK = wide(scores_BK) / epsilon
    if valid_B is None:
        valid_B = torch.ones_like(log_BK[:, 0], dtype=torch.bool)
    absent_B1 = ~valid_B[:, None]
    for _ in range(iterations):
        log_BK = log_BK - log_BK.masked_fill(absent_B1, -torch.inf).logsumexp(0, keepdim=True)
        log_BK = log_BK - log_BK.logsumexp(1, keepdim=True)
    return log_BK.exp().masked_fill(absent_B1, 0.0)


def soft_cross_entropy(scores_BK: Tensor, target_BK: Tensor, temperature: float) -> Tensor:
    """(B,) cross-entropy of softmax(scores / temperature) with soft targets, in nats."""
    return -(target_BK * (wide(scores_BK) / temperature).log_softmax(-1)).sum(-1)
