"""Frames of a row against each other: a context vector picks its own target among negatives.

Letters in shapes: P rows, N frames of a row, M marked frames of a row, C candidate frames of a row,
K negatives of a frame, D width.

The work is done in a dense layout: the frames that a mask marks stand first, in time order
(`marked`, `take`). One product of the context vectors with all candidates gives every similarity;
negatives drawn with replacement enter as multiplicities of the candidates. No (P, M, K, D) tensor
exists, and no similarity is computed twice or for a frame that asks nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.objectives.codes import NORM_EPS
from mmssl.objectives.precision import wide
from mmssl.rng import row_bits


@dataclass(frozen=True)
class Marked:
    """Where the marked frames of each row are.

    index_PM: int64 frame numbers, the marked ones first and in time order; all differ in a row.
    filled_PM: bool, True where a place holds a marked frame; M is the largest number in the batch.
    """

    index_PM: Tensor
    filled_PM: Tensor


@dataclass(frozen=True)
class Negatives:
    """Which candidates compete with the target of each marked frame.

    index_PMK: int64 places among the candidates of the row.
    asked_PM: bool, False where a place is empty or the row has no other candidate.
    """

    index_PMK: Tensor
    asked_PM: Tensor


class FrameLoss(NamedTuple):
    """Loss and hits summed over the frames that were asked, and their number."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which nobody needs
    correct: Tensor


def marked(mask_PN: Tensor) -> Marked:
    """The dense layout of a bool mask, at least one place wide."""
    count_P1 = mask_PN.sum(1, keepdim=True)
    width = max(1, int(count_P1.max())) if mask_PN.numel() else 1
    # Places behind the marked frames hold other frames of the row, each once: a gather's gradient
    # then adds nothing up, and does not depend on the order of the additions.
    index_PM = (~mask_PN).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    place_M = torch.arange(index_PM.shape[1], device=mask_PN.device)
    return Marked(index_PM, place_M < count_P1)


def take(x_PND: Tensor, where: Marked) -> Tensor:
    """(P, M, D) the marked frames, zeros without gradient in empty places."""
    index_PMD = where.index_PM[..., None].expand(-1, -1, x_PND.shape[-1])
    taken_PMD = x_PND.gather(1, index_PMD)
    return torch.where(where.filled_PM[..., None], taken_PMD, torch.zeros_like(taken_PMD))


def draw_negatives(
    seeds_P: Tensor,
    hidden: Marked,
    count: int,
    among: Marked | None = None,
    stream: str = "negatives",
) -> Negatives:
    """`count` negatives of every hidden frame, uniform with replacement, never the frame itself.

    Args:
        seeds_P: int64 row seeds; a row's draws depend on nothing but its seed and its marks.
        hidden: the frames that ask.
        count: K.
        among: candidates, default the hidden frames (wav2vec 2.0, Baevski et al. 2020); all valid
            frames in UniSpeech (Wang et al. 2021).
        stream: name of the random stream.
    """
    own_PM, is_candidate_PM = _own_places(hidden, among)
    candidates_P1 = (among or hidden).filled_PM.sum(1, keepdim=True)
    others_PM = candidates_P1 - is_candidate_PM.long()
    places = own_PM.shape[1]
    bits_PMK = row_bits(seeds_P, places * count, stream).reshape(-1, places, count)
    index_PMK = bits_PMK % others_PM.clamp(min=1)[..., None]
    skip_PMK = is_candidate_PM[..., None] & (index_PMK >= own_PM[..., None])
    asked_PM = hidden.filled_PM & (others_PM > 0)
    index_PMK = torch.where(asked_PM[..., None], index_PMK + skip_PMK.long(), 0)
    return Negatives(index_PMK, asked_PM)


def draw_over_rows(
    seeds_P: Tensor,
    frames: int,
    lengths_G: Tensor,
    seeds_G: Tensor,
    count: int,
    stream: str = "negatives",
) -> tuple[Tensor, Tensor]:
    """`count` negatives of every frame t of P rows among the frames of G rows (CPC_audio).

    Uniform over the rows that have frames, the own one included, then over its frames but t: frame
    (t + 1 ... T - 1) mod T of a row of T frames, 0 where T is 1.

    Args:
        seeds_P: int64 row seeds; draws do not depend on where a row stands.
        frames: N, of a row that asks.
        lengths_G: int64 valid frames of the rows of all ranks, 0 for none.
        seeds_G: their seeds, which tell them apart.
        count: K.
        stream: name of the random stream.

    Returns:
        (P, N, K) int64 rows and (P, N, K) int64 frames.
    """
    last = torch.iinfo(torch.int64).max
    order_G = torch.where(lengths_G > 0, seeds_G, last).argsort(stable=True)
    rows = (lengths_G > 0).sum().clamp(min=1)
    bits = row_bits(seeds_P, frames * count * 2, stream).reshape(-1, frames, count, 2)
    row_PNK = order_G[bits[..., 0] % rows]
    length_PNK = lengths_G[row_PNK].clamp(min=1)
    shift_PNK = 1 + bits[..., 1] % (length_PNK - 1).clamp(min=1)
    own_N1 = torch.arange(frames, device=seeds_P.device)[:, None]
    return row_PNK, (own_N1 + shift_PNK) % length_PNK


def identical(a_PMD: Tensor, b_PCD: Tensor) -> Tensor:
    """(P, M, C) bool: which vectors, or tuples of ids below 2^31, are equal in every component.

    Each vector becomes one 64-bit key, the sum of its 32-bit words times odd random factors: equal
    vectors always have equal keys, different ones with a chance below 2^-31.
    """
    return _keys(a_PMD)[:, :, None] == _keys(b_PCD)[:, None]


def frame_nce(
    context_PMD: Tensor,
    positive_PMD: Tensor,
    candidate_PCD: Tensor,
    negatives: Negatives,
    temperature: float = 0.1,
    same_PMC: Tensor | None = None,
) -> FrameLoss:
    """InfoNCE on cosine similarities (wav2vec 2.0, equation 3); no vector is detached.

    -ln of exp(cos(c, q) / temperature) over its sum with those of the negatives. A negative that is
    equal to the positive leaves the sum. Constant similarities give ln(1 + negatives that stay).

    Args:
        context_PMD: predictions c of the marked frames.
        positive_PMD: their targets q.
        candidate_PCD: vectors the negatives are drawn from; often the targets themselves.
        negatives: of `draw_negatives`.
        temperature: divides the similarities.
        same_PMC: bool, which candidates are equal to the positive; default `identical` on the
            vectors. Quantised targets pass `identical` on their ids: a projection behind the
            quantizer may round equal inputs differently.
    """
    if same_PMC is None:
        same_PMC = identical(positive_PMD.detach(), candidate_PCD.detach())
    with torch.autocast(context_PMD.device.type, enabled=False):
        vectors = (context_PMD, positive_PMD, candidate_PCD)
        context_PMD, positive_PMD, candidate_PCD = (
            F.normalize(wide(x), dim=-1, eps=NORM_EPS) for x in vectors
        )
        own_PM, other_PMC = _scores(context_PMD / temperature, positive_PMD, candidate_PCD)
        times_PMC = _multiplicity(negatives, other_PMC).masked_fill(same_PMC, 0)
        return _softmax(own_PM, other_PMC, times_PMC, negatives)


def frame_dot_nce(
    context_PMD: Tensor,
    positive_PMD: Tensor,
    candidate_PCD: Tensor,
    negatives: Negatives,
    temperature: float = 1.0,
) -> FrameLoss:
    """InfoNCE on dot products (CPC, van den Oord et al. 2018, equation 4): ln(1 + K) where c is 0.

    Arguments as `frame_nce`; equal vectors stay in.
    """
    with torch.autocast(context_PMD.device.type, enabled=False):
        context_PMD, positive_PMD = wide(context_PMD) / temperature, wide(positive_PMD)
        own_PM, other_PMC = _scores(context_PMD, positive_PMD, wide(candidate_PCD))
        return _softmax(own_PM, other_PMC, _multiplicity(negatives, other_PMC), negatives)


def frame_bce(
    context_PMD: Tensor, positive_PMD: Tensor, candidate_PCD: Tensor, negatives: Negatives
) -> FrameLoss:
    """Yes/no loss on dot products (wav2vec, Schneider et al. 2019; vq-wav2vec).

    -ln sigmoid(c . q) - the sum over the negatives of ln sigmoid(-c . q_n): (1 + K) ln 2 where
    the context is 0. Arguments as `frame_nce`; equal vectors stay in.
    """
    with torch.autocast(context_PMD.device.type, enabled=False):
        own_PM, other_PMC = _scores(wide(context_PMD), wide(positive_PMD), wide(candidate_PCD))
        times_PMC = _multiplicity(negatives, other_PMC)
        loss_PM = F.softplus(-own_PM) + (times_PMC * F.softplus(other_PMC)).sum(-1)
        return _summed(loss_PM, own_PM, _best(other_PMC, times_PMC), negatives)


def _own_places(hidden: Marked, among: Marked | None) -> tuple[Tensor, Tensor]:
    """(P, M) place of each hidden frame among the candidates, and whether it is one of them."""
    if among is None:
        place_M = torch.arange(hidden.index_PM.shape[1], device=hidden.index_PM.device)
        return place_M.expand_as(hidden.index_PM), hidden.filled_PM
    last = torch.iinfo(torch.int64).max
    frames_PC = torch.where(among.filled_PM, among.index_PM, last)  # ascending
    own_PM = torch.searchsorted(frames_PC, hidden.index_PM.contiguous())
    own_PM = own_PM.clamp(max=frames_PC.shape[1] - 1)
    return own_PM, frames_PC.gather(1, own_PM) == hidden.index_PM


def _keys(x_PMD: Tensor) -> Tensor:
    if x_PMD.is_floating_point():
        # + 0 turns -0 into 0, which it equals. 64-bit floats become two words each: the sign bit of
        # a 64-bit word would be lost in an even number of products.
        x_PMD = (wide(x_PMD) + 0.0).contiguous().view(torch.int32)
    seed = torch.zeros(1, dtype=torch.int64, device=x_PMD.device)
    factor_D = row_bits(seed, x_PMD.shape[-1], "identical")[0] | 1
    return (x_PMD.long() * factor_D).sum(-1)


def _scores(c_PMD: Tensor, positive_PMD: Tensor, candidate_PCD: Tensor) -> tuple[Tensor, Tensor]:
    return (c_PMD * positive_PMD).sum(-1), torch.bmm(c_PMD, candidate_PCD.transpose(1, 2))


@torch.no_grad()
def _multiplicity(negatives: Negatives, like_PMC: Tensor) -> Tensor:
    """(P, M, C) how often each candidate was drawn; whole numbers, exact in any order."""
    one_PMK = torch.ones_like(negatives.index_PMK, dtype=like_PMC.dtype)
    return torch.zeros_like(like_PMC).scatter_add_(2, negatives.index_PMK, one_PMK)


def _softmax(
    own_PM: Tensor, other_PMC: Tensor, times_PMC: Tensor, negatives: Negatives
) -> FrameLoss:
    """Written out, as a `logsumexp` with logarithms of the counts takes twice as long."""
    best_PM = _best(other_PMC, times_PMC)
    top_PM = torch.maximum(best_PM, own_PM.detach())
    # the clamp bounds candidates alone that were not drawn, whose weight is 0
    gap_PMC = (other_PMC - top_PM[..., None]).clamp(max=0)
    total_PM = (own_PM - top_PM).exp() + (times_PMC * gap_PMC.exp()).sum(-1)
    loss_PM = total_PM.log() + top_PM - own_PM
    return _summed(loss_PM, own_PM, best_PM, negatives)


def _best(other_PMC: Tensor, times_PMC: Tensor) -> Tensor:
    """(P, M) highest score of a candidate that was drawn; -inf where there is none."""
    return other_PMC.detach().masked_fill(times_PMC == 0, -torch.inf).amax(-1)


def _summed(loss_PM: Tensor, own_PM: Tensor, best_PM: Tensor, negatives: Negatives) -> FrameLoss:
    """A hit is strictly better than every negative, of which there must be one."""
    asked_PM = negatives.asked_PM
    hit_PM = (own_PM.detach() > best_PM) & (best_PM > -torch.inf) & asked_PM
    total = torch.where(asked_PM, loss_PM, torch.zeros_like(loss_PM)).sum()
    return FrameLoss(total, asked_PM.sum().to(total.dtype), hit_PM.sum().to(total.dtype))
