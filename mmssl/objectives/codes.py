"""How much of a codebook is used, and prediction of code ids by cosine.

Letters in shapes: G groups, V entries of a group, N frames, D width, C codewords.

Entropies are not additive: the probabilities are averaged over the frames of all ranks first, so
that the value does not depend on the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl import dist
from mmssl.objectives.classification import softmax_cross_entropy
from mmssl.objectives.precision import wide

# torch's cosine similarity uses the same bound
NORM_EPS = 1e-8


def diversity(soft_GV: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of the share of the codebook that is not used, one value for every frame.

    (G V - sum over g of exp(H(p_g))) / (G V) with p_g averaged over all frames of all ranks, as in
    the released code of wav2vec 2.0 (Baevski et al. 2020; the paper's equation 4 has another
    scale): 0 for uniform use, (G V - G) / (G V) where each group knows one entry. Every rank counts
    the common value once for each of its frames, so that the mean is that value and the weight of
    the paper, which multiplies the masked frames, carries over. One collective.

    Args:
        soft_GV: probabilities summed over the frames of this rank (`Codes.soft_GV`).
        count: those frames.
    """
    used = _perplexity(_mean_over_ranks(soft_GV, count))
    count = count.detach()
    return (1 - used / soft_GV.numel()) * count, count


@torch.no_grad()
def perplexity(sum_GV: Tensor, count: Tensor) -> Tensor:
    """Sum over groups of exp(entropy), over the frames of all ranks: G if collapsed, G V at most.

    Args:
        sum_GV: probabilities (`Codes.soft_GV`) or choices (`Codes.hard_GV`) summed over the frames
            of this rank.
        count: those frames.
    """
    return _perplexity(_mean_over_ranks(sum_GV, count))


@torch.no_grad()
def usage(hard_GV: Tensor) -> Tensor:
    """() least exp(entropy) of a group's choices, over what is possible: V entries, or the frames.

    Over the frames of all ranks: near 1 for even choices, 1 / V where a group knows one entry. A
    group that has collapsed shows, however even the others are.

    Args:
        hard_GV: choices of this rank (`Codes.hard_GV`, or a histogram of classes).
    """
    total_GV = dist.sum_over_ranks(wide(hard_GV))
    frames_G1 = total_GV.sum(-1, keepdim=True).clamp(min=1)
    used_G = torch.special.entr(total_GV / frames_G1).sum(-1).exp()
    possible_G = frames_G1[:, 0].clamp(max=total_GV.shape[1])
    return torch.amin(used_G / possible_G)


def codeword_logits(x_ND: Tensor, codewords_CD: Tensor, temperature: float = 0.1) -> Tensor:
    """(N, C) cosine similarities over the temperature (HuBERT, Hsu et al. 2021)."""
    with torch.autocast(x_ND.device.type, enabled=False):
        x_ND = F.normalize(wide(x_ND), dim=-1, eps=NORM_EPS)
        codewords_CD = F.normalize(wide(codewords_CD), dim=-1, eps=NORM_EPS)
        return x_ND @ codewords_CD.T / temperature


def codeword_cross_entropy(
    logits_NC: Tensor, labels_N: Tensor, valid_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the cross-entropy of code ids over the valid frames; equal logits give ln C.

    Args:
        logits_NC: of `codeword_logits`.
        labels_N: int64 codewords; not read where the frame is not valid.
        valid_N: bool, default all.
    """
    if valid_N is None:
        valid_N = torch.ones_like(labels_N, dtype=torch.bool)
    loss_N = softmax_cross_entropy(logits_NC, labels_N, valid_N)
    return loss_N.sum(), valid_N.sum().to(loss_N.dtype)


def _mean_over_ranks(sum_GV: Tensor, count: Tensor) -> Tensor:
    sum_GV = wide(sum_GV)
    packed = torch.cat([sum_GV.flatten(), count.detach().to(sum_GV).reshape(1)])
    packed = dist.sum_with_gradient(packed)
    return (packed[:-1] / packed[-1].detach().clamp(min=1)).reshape(sum_GV.shape)


def _perplexity(p_GV: Tensor) -> Tensor:
    # An entry of probability 0 adds 0, and the bound keeps its gradient finite: that of p ln p is
    # infinite there, and a softmax that underflowed would turn it into NaN.
    log_GV = p_GV.clamp(min=torch.finfo(p_GV.dtype).tiny).log()
    return (-(p_GV * log_GV).sum(-1)).exp().sum()
