"""Cross-entropy and accuracy over rows or tokens with validity masks.

Letters in shapes: P rows, K classes, N tokens, V vocabulary. Losses are in nats, fp32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.objectives.precision import wide


def softmax_cross_entropy(
    logits_PK: Tensor, target_P: Tensor, valid_P: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """(P,) cross-entropy of each row; 0 and without gradient where a row is not valid.

    Args:
        logits_PK: one logit per class.
        target_P: int64 class numbers; not read where the row is not valid.
        valid_P: bool, default all.
        smoothing: label smoothing (Szegedy et al. 2016).
    """
    if valid_P is None:
        valid_P = torch.ones_like(target_P, dtype=torch.bool)
    target_P = torch.where(valid_P, target_P, torch.zeros_like(target_P))
    loss_P = F.cross_entropy(wide(logits_PK), target_P, reduction="none", label_smoothing=smoothing)
    return torch.where(valid_P, loss_P, torch.zeros_like(loss_P))


def binary_cross_entropy(
    logits_P: Tensor, target_P: Tensor, valid_P: Tensor | None = None
) -> Tensor:
    """(P,) yes/no cross-entropy of any shape; target bool, or a probability.

    Equal to `softmax_cross_entropy` of two logits whose difference (yes - no) is `logits_P`.
    """
    logits_P = wide(logits_P)
    loss_P = F.binary_cross_entropy_with_logits(
        logits_P, target_P.to(logits_P.dtype), reduction="none"
    )
    return loss_P if valid_P is None else torch.where(valid_P, loss_P, torch.zeros_like(loss_P))


def token_cross_entropy(
    logits_PNV: Tensor, ids_PN: Tensor, hidden_PN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Masked-token prediction: (sum, count) of the cross-entropy at the hidden places.

    Leading axes are free: (H, V) logits of the hidden tokens alone need no `hidden_PN`.

    Args:
        logits_PNV: one logit per vocabulary entry.
        ids_PN: int64 true ids.
        hidden_PN: bool, the places to predict; default all.
    """
    if hidden_PN is None:
        hidden_PN = torch.ones_like(ids_PN, dtype=torch.bool)
    loss_PN = softmax_cross_entropy(
        logits_PNV.flatten(0, -2), ids_PN.flatten(), hidden_PN.flatten()
    )
    return loss_PN.sum(), hidden_PN.sum().to(loss_PN.dtype)


@torch.no_grad()
def correct(
    logits_PK: Tensor, target_P: Tensor, valid_P: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum, count) of rows whose target has the strictly highest logit; a tie is a miss.

    Leading axes are free: (P, N, V) logits with (P, N) targets count tokens.
    """
    if valid_P is None:
        valid_P = torch.ones_like(target_P, dtype=torch.bool)
    target_P = torch.where(valid_P, target_P, torch.zeros_like(target_P))
    own_P1 = logits_PK.gather(-1, target_P[..., None])
    rivals_P = (logits_PK >= own_P1).sum(-1) - 1
    return ((rivals_P == 0) & valid_P).sum().float(), valid_P.sum().float()


@torch.no_grad()
def correct_binary(
    logits_P: Tensor, target_P: Tensor, valid_P: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum, count) of yes/no decisions on the right side of 0; a logit of 0 is a miss."""
    hit_P = torch.where(target_P.bool(), logits_P > 0, logits_P < 0)
    if valid_P is None:
        valid_P = torch.ones_like(hit_P)
    return (hit_P & valid_P).sum().float(), valid_P.sum().float()
