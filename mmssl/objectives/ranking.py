"""Learning to rank through an argmax that noise makes differentiable.

Letters in shapes: P rows, N things to be ranked, M draws of the noise. Ranks are 1 ... N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.objectives.precision import wide
from mmssl.rng import row_uniform

_HALF_STEP = 2.0**-25  # keeps uniform numbers, multiples of 2^-24, away from 0 and 1


def ranks(scores: Tensor) -> Tensor:
    """(..., N) ranks of scores, N for the highest, in their dtype; equal ones in their order."""
    return scores.argsort(dim=-1, stable=True).argsort(-1).to(scores.dtype) + 1


def normal_noise(seeds_P: Tensor, draws: int, things: int, stream: str) -> Tensor:
    """(P, M, N) standard normal numbers of the rows' seeds, fp32."""
    # In fp64: fp32 has no number between the largest uniform one and 1, whose noise is infinite.
    u_PK = row_uniform(seeds_P, draws * things, stream).double() + _HALF_STEP
    noise_PK: Tensor = torch.special.ndtri(u_PK)
    return noise_PK.float().reshape(-1, draws, things)


def perturbed_ranking(
    theta_PN: Tensor, target_PN: Tensor, noise_PMN: Tensor, epsilon: float = 1.0
) -> Tensor:
    """(P,) Fenchel-Young loss of perturbed ranks: F(theta) - <theta, y>.

    F(theta) is the mean over the draws Z of max over permutations r of <r, theta + epsilon Z>,
    which ranks(theta + epsilon Z) attain, so that its gradient is their mean, and that of the loss
    the mean minus y (Berthet et al. 2020, eq. 9 and proposition 3.1; Carr et al. 2021). Nothing is
    differentiated through a sort. The same draws serve value and gradient.

    Args:
        theta_PN: scores.
        target_PN: ranks y.
        noise_PMN: standard normal numbers Z.
        epsilon: size of the noise; 0 makes it a perceptron's loss.
    """
    theta_PN = wide(theta_PN)
    noisy_PMN = theta_PN[:, None] + epsilon * noise_PMN.to(theta_PN.dtype)
    best_PM = (ranks(noisy_PMN.detach()) * noisy_PMN).sum(-1)
    return best_PM.mean(1) - (theta_PN * target_PN.to(theta_PN.dtype)).sum(-1)


@torch.no_grad()
def kendall_tau(theta_PN: Tensor, target_PN: Tensor) -> Tensor:
    """(P,) share of pairs in the order of the target minus that of pairs in the other order."""
    things = theta_PN.shape[1]
    i, j = torch.triu_indices(things, things, 1, device=theta_PN.device)
    said, true = theta_PN[:, i] - theta_PN[:, j], target_PN[:, i] - target_PN[:, j]
    return (said.sign() * true.sign()).to(theta_PN.dtype).mean(1)
