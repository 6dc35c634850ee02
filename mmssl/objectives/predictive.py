"""Predictive information of a Gaussian process, from the covariance of windows of frames (DAPC).

Letters in shapes: P rows, N frames, F features of a latent, T frames of a window's half, W windows,
K features of a window (2 T F).

Log determinants are not additive: covariances are taken over the windows of all ranks, so that the
value does not depend on the number of ranks. All is computed in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl import dist


def predictive_information(
    z_PNF: Tensor, valid_PN: Tensor, half: int, ridge: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the information, in nats, that T frames have about the next T.

    PI = log det C_T - 0.5 log det C_2T of a stationary Gaussian process, with C_2T the covariance
    of all windows of 2 T valid frames, plus `ridge` times the identity, and C_T its first block
    (Bai et al. 2021, Deep Autoencoding Predictive Components, equation 3; Clark et al. 2019). It is
    0 for white noise, does not change when all frames go through one invertible linear map, and is
    biased upwards by about (T F)^2 / (2 W).

    Every rank counts the common value once for each of its windows.

    Args:
        z_PNF: latents, with gradient.
        valid_PN: bool; a window with a frame that is not valid does not count.
        half: T.
        ridge: keeps the determinant of features that depend on each other finite.
    """
    windows_WK = _windows(z_PNF, valid_PN, 2 * half)
    covariance_KK = _covariance(windows_WK) + ridge * torch.eye(
        windows_WK.shape[1], dtype=windows_WK.dtype, device=windows_WK.device
    )
    first = half * z_PNF.shape[2]
    value = torch.logdet(covariance_KK[:first, :first]) - 0.5 * torch.logdet(covariance_KK)
    return _counted(value, windows_WK)


def whiteness(z_PNF: Tensor, valid_PN: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of |Cov(z) - I|^2 (Frobenius) over the valid frames of all ranks.

    DAPC's penalty: predictive information alone does not fix the scale and mixture of the features.
    Every rank counts the common value once for each of its frames.
    """
    frames_WF = _windows(z_PNF, valid_PN, 1)
    covariance_FF = _covariance(frames_WF)
    identity = torch.eye(len(covariance_FF), dtype=frames_WF.dtype, device=frames_WF.device)
    return _counted((covariance_FF - identity).square().sum(), frames_WF)


def _windows(z_PNF: Tensor, valid_PN: Tensor, length: int) -> Tensor:
    """(W, length * F) all runs of valid frames, frame by frame, fp64."""
    if z_PNF.shape[1] < length:  # none, but with the graph that other ranks' gradients pass through
        return z_PNF.double().flatten()[:0].reshape(0, length * z_PNF.shape[2])
    whole_PM = valid_PN.unfold(1, length, 1).all(-1)
    return z_PNF.double().unfold(1, length, 1).transpose(-1, -2)[whole_PM].flatten(1)


def _covariance(x_WK: Tensor) -> Tensor:
    """(K, K) over the rows of all ranks; zeros without any row."""
    ones_W1 = x_WK.new_ones(len(x_WK), 1)
    packed_KL = dist.sum_with_gradient(x_WK.T @ torch.cat([x_WK, ones_W1], 1))
    total = dist.sum_over_ranks(ones_W1.sum()).clamp(min=1)
    mean_K, square_KK = packed_KL[:, -1] / total, packed_KL[:, :-1] / total
    return square_KK - mean_K[:, None] * mean_K


def _counted(value: Tensor, x_WK: Tensor) -> tuple[Tensor, Tensor]:
    count = value.new_tensor(float(len(x_WK)))
    return value * count, count
