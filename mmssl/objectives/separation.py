"""How well separated sounds are what was mixed, and which output stands for which source.

Letters in shapes: P mixtures, M outputs, K references, S samples, A assignments. Samples behind the
end of a mixture are 0. Everything is in decibels, in fp32 or wider.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations, product

import torch
from torch import Tensor

from mmssl.objectives.precision import wide


def si_sdr(estimate: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """(...) scale-invariant signal-to-distortion ratio of (..., S) signals (Le Roux et al. 2019).

    10 log10(|a r|^2 / |e - a r|^2) with a = <e, r> / |r|^2 of signals whose mean is taken out, each
    with the machine's epsilon added, as torchmetrics does. Leading axes are broadcast.

    lengths: (...) valid samples. A silent reference gives a number that means nothing.
    """
    e, r = _centred(estimate, lengths), _centred(reference, lengths)
    tiny = torch.finfo(e.dtype).eps
    scale = ((e * r).sum(-1, keepdim=True) + tiny) / (r.square().sum(-1, keepdim=True) + tiny)
    aimed = scale * r
    kept, lost = aimed.square().sum(-1), (e - aimed).square().sum(-1)
    return 10 * ((kept + tiny) / (lost + tiny)).log10()


def noise_to_signal(estimate: Tensor, reference: Tensor, limit_db: float) -> Tensor:
    """(...) -SNR of (..., S) signals, not below -`limit_db` (Wisdom et al. 2020, eq. 2).

    10 log10(|r - e|^2 + t |r|^2) - 10 log10 |r|^2, t = 10^(-limit_db / 10): a perfect estimate has
    -`limit_db` (and a gradient of 0), none at all 10 log10(1 + t).
    """
    e, r = wide(estimate), wide(reference)
    tiny = torch.finfo(r.dtype).tiny
    power, error = r.square().sum(-1), (r - e).square().sum(-1)
    limit = 10 ** (-limit_db / 10)
    return 10 * ((error + limit * power + tiny).log10() - (power + tiny).log10())


@torch.no_grad()
def best_permutation(cost_PMK: Tensor, audible_PK: Tensor) -> Tensor:
    """(P, K) outputs, all different, whose summed cost on the audible references is the least.

    Permutation invariant training on whole utterances (Kolbaek et al. 2017); all M! / (M - K)!
    choices are compared.
    """
    outputs, references = cost_PMK.shape[1:]
    choices_AK = _choices(outputs, references).to(cost_PMK.device)
    cost_PMK = cost_PMK.masked_fill(~audible_PK[:, None], 0.0)
    picked_PAK = cost_PMK[:, choices_AK, torch.arange(references, device=cost_PMK.device)]
    return choices_AK[picked_PAK.sum(-1).argmin(1)]


@torch.no_grad()
def best_remix(estimate_PMS: Tensor, reference_PKS: Tensor, limit_db: float) -> Tensor:
    """(P, M) the reference that each output is added to, so that `noise_to_signal` is the least.

    Mixture invariant training (Wisdom et al. 2020, eq. 3). All K^M assignments are compared, by
    products of the signals instead of the K^M remixes themselves.
    """
    e, r = estimate_PMS.double(), reference_PKS.double()
    outputs, references = e.shape[1], r.shape[1]
    parts_AKM = _assignments(outputs, references).to(e.device)
    own_PMM, cross_PKM = e @ e.transpose(1, 2), r @ e.transpose(1, 2)
    power_PK = r.square().sum(-1)
    twice_PAK = torch.einsum("akm,pkm->pak", parts_AKM, cross_PKM)
    mixed_PAK = torch.einsum("akm,pmn,akn->pak", parts_AKM, own_PMM, parts_AKM)
    error_PAK = (power_PK[:, None] - 2 * twice_PAK + mixed_PAK).clamp(min=0)
    limit, tiny = 10 ** (-limit_db / 10), torch.finfo(e.dtype).tiny
    loss_PA = (error_PAK + limit * power_PK[:, None] + tiny).log10().sum(-1)
    return parts_AKM[loss_PA.argmin(1)].argmax(1)


def remixed(estimate_PMS: Tensor, place_PM: Tensor, references: int) -> Tensor:
    """(P, K, S) sums of the outputs that `best_remix` puts together."""
    zeros = estimate_PMS.new_zeros(len(estimate_PMS), references, estimate_PMS.shape[2])
    return zeros.scatter_add(1, place_PM[..., None].expand_as(estimate_PMS), estimate_PMS)


def _centred(x: Tensor, lengths: Tensor) -> Tensor:
    """Signals without their mean over the valid samples; 0 behind them."""
    x, lengths = wide(x), lengths[..., None]
    inside = torch.arange(x.shape[-1], device=x.device) < lengths
    x = x * inside
    return (x - x.sum(-1, keepdim=True) / lengths.clamp(min=1)) * inside


@cache
def _choices(outputs: int, references: int) -> Tensor:
    return torch.tensor(list(permutations(range(outputs), references)))


@cache
def _assignments(outputs: int, references: int) -> Tensor:
    """(A, K, M) fp64, 1 where an output belongs to a reference."""
    place_AM = torch.tensor(list(product(range(references), repeat=outputs)))
    return torch.nn.functional.one_hot(place_AM, references).transpose(1, 2).double()
