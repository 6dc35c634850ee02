"""Transcripts without alignment: connectionist temporal classification.

P items, N frames, V symbols with the blank, U symbols of a transcript.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.objectives.precision import wide

BLANK = 0


def ctc(
    logits_PNV: Tensor, frames_P: Tensor, ids_PU: Tensor, symbols_P: Tensor
) -> tuple[Tensor, Tensor]:
    """-ln of the chance of a transcript, summed over its alignments (Graves et al. 2006).

    Equal logits of V classes over N frames give N ln V - ln C(N + U, 2 U) for U symbols of which no
    two neighbours are equal.

    Args:
        logits_PNV: class 0 is the blank.
        frames_P: valid frames.
        ids_PU: int64, from 1; not read behind an item's end.
        symbols_P: length of the transcripts, 0 where there is none.

    Returns:
        (P,) losses in nats, and bool (P,): which items count. Those without a transcript, or with
        one that needs more frames than there are (one per symbol, and a blank between equal
        neighbours), have loss 0 and send no gradient.
    """
    place_U = torch.arange(1, ids_PU.shape[1], device=ids_PU.device)
    twice_P = ((ids_PU[:, 1:] == ids_PU[:, :-1]) & (place_U < symbols_P[:, None])).sum(1)
    counts_P = (symbols_P > 0) & (symbols_P + twice_P <= frames_P)
    with torch.autocast(logits_PNV.device.type, enabled=False):
        log_NPV = wide(logits_PNV).log_softmax(-1).transpose(0, 1)
        # what does not count is given an empty transcript: an impossible one has gradient NaN
        length_P = torch.where(counts_P, symbols_P, 0)
        loss_P = F.ctc_loss(
            log_NPV, ids_PU, frames_P.clamp(min=1), length_P, BLANK, reduction="none"
        )
    return torch.where(counts_P, loss_P, torch.zeros_like(loss_P)), counts_P
