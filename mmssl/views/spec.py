"""Augmentations of normalised log-mel spectrograms, (P, 1, T, F), whole batches at once.

Every draw is a function of the item's own seed. P items, T frames, F bands, K bins to read from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.rng import row_uniform

_A = -0.75  # of the cubic kernel, as in torch's and OpenCV's bicubic interpolation (Keys 1981)


def mix_exp(x: Tensor, other: Tensor, share_P: Tensor) -> Tensor:
    """ln((1 - share) e^x + share e^other): mixing of sounds on their logarithms.

    BYOL-A (Niizumi et al. 2021, eq. 1); 0 leaves x as it is, bit for bit.
    """
    share = share_P.reshape(-1, *[1] * (x.ndim - 1))
    mixed = torch.logaddexp(x + torch.log1p(-share), other + share.log())
    return torch.where(share > 0, mixed, x)


def random_resize_crop(
    x_P1TF: Tensor,
    seeds_P: Tensor,
    canvas: float,
    time: tuple[float, float],
    bands: tuple[float, float],
) -> Tensor:
    """Cut a random rectangle out of a canvas of zeros and resize it to the size of the input.

    BYOL-A's random resize crop: the input lies in the middle of a canvas of `canvas` times its
    frames; a rectangle of floor(U(time) T) frames and floor(min(U(bands), 1) F) bands is cut
    anywhere and resized by bicubic interpolation with aligned corners.
    """
    steps, size = x_P1TF.shape[2:]
    wide = int(canvas * steps)
    u_P4 = row_uniform(seeds_P, 4, "resize_crop").double()
    width_P = _floor(time[0] + (time[1] - time[0]) * u_P4[:, 0], steps).clamp(max=wide)
    height_P = _floor((bands[0] + (bands[1] - bands[0]) * u_P4[:, 1]).clamp(max=1), size)
    left_P = (u_P4[:, 2] * (wide - width_P + 1)).long() - (wide - steps) // 2
    low_P = (u_P4[:, 3] * (size - height_P + 1)).long()
    in_time = _resampling(left_P, width_P, steps, steps)
    in_bands = _resampling(low_P, height_P, size, size)
    with torch.autocast(x_P1TF.device.type, enabled=False):
        return (in_time.to(x_P1TF) @ x_P1TF[:, 0] @ in_bands.to(x_P1TF).transpose(1, 2))[:, None]


def linear_fader(x_P1TF: Tensor, seeds_P: Tensor, gain: float) -> Tensor:
    """Add a line over time that begins and ends at values drawn from U(-gain, gain) (BYOL-A v2)."""
    ends_P2 = gain * (2 * row_uniform(seeds_P, 2, "fader") - 1)
    steps_T = torch.linspace(0, 1, x_P1TF.shape[2], device=x_P1TF.device)
    line_PT = torch.lerp(ends_P2[:, :1], ends_P2[:, 1:], steps_T[None])
    return x_P1TF + line_PT[:, None, :, None].to(x_P1TF)


def _floor(share_P: Tensor, size: int) -> Tensor:
    return (share_P * size).long().clamp(min=1)


def _resampling(first_P: Tensor, length_P: Tensor, size: int, outputs: int) -> Tensor:
    """(P, outputs, size) weights by which bins of a crop are read; those outside weigh nothing.

    The crop of an item has bins first ... first + length - 1, of which those outside of [0, size)
    are zeros. Output i is read at i (length - 1) / (outputs - 1), taps beyond the crop's border at
    its border.
    """
    place_N = torch.linspace(0, 1, outputs, dtype=torch.float64, device=first_P.device)
    at_PN = place_N * (length_P - 1)[:, None]
    base_PN = at_PN.floor()
    weights = first_P.new_zeros(len(first_P), outputs, size, dtype=torch.float64)
    for tap in (-1, 0, 1, 2):
        bin_PN = (base_PN.long() + tap).clamp(min=0).minimum((length_P - 1)[:, None])
        bin_PN = bin_PN + first_P[:, None]
        weight_PN = _cubic((at_PN - base_PN - tap).abs())
        weight_PN = weight_PN * ((bin_PN >= 0) & (bin_PN < size))
        weights.scatter_add_(2, bin_PN.clamp(0, size - 1)[..., None], weight_PN[..., None])
    return weights


def _cubic(d: Tensor) -> Tensor:
    """Keys's kernel at distances below 2."""
    near = ((_A + 2) * d - (_A + 3)) * d * d + 1
    far = ((_A * d - 5 * _A) * d + 8 * _A) * d - 4 * _A
    return torch.where(d <= 1, near, far)
