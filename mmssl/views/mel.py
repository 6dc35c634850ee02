"""Augmentations of linear mel spectrograms (Jansen et al. 2018): (P, 1, T, F), whole batches.

Every draw is a function of the item's own seed. They stand among a view's `augment` and wait for
the front-end: its logarithm is taken back, and taken again behind them. P items, T frames, F bands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmssl.rng import row_uniform
from mmssl.specs import AugmentSpec


class Items(NamedTuple):
    """What an operation knows of the items besides their cells.

    steps_P: frames up to an item's end. other: (P, 1, T, F) sounds of other recordings; zeros where
    there is none.
    """

    seeds_P: Tensor
    steps_P: Tensor
    other: Tensor


_SILENT = 1e-6  # energy of a sound that counts as none


def mel_noise(x: Tensor, items: Items, std: float = 0.5) -> Tensor:
    """Multiply every cell by 1 + |e|, e ~ N(0, std^2)."""
    u = row_uniform(items.seeds_P, x[0].numel(), "mel_noise").double()
    half_normal = math.sqrt(2) * torch.erfinv(u)  # u in [0, 1)
    return x * (1 + std * half_normal.view(x.shape)).to(x)


def mel_shift(x: Tensor, items: Items, bands: int = 10) -> Tensor:
    """Shift by any number of frames, around the item's end, and by up to `bands` bands up or down.

    Bands that are left empty are silent.
    """
    steps, size = x.shape[2:]
    u_P2 = row_uniform(items.seeds_P, 2, "mel_shift").double()
    by_P = (u_P2[:, 0] * items.steps_P).long()
    up_P = (u_P2[:, 1] * (2 * bands + 1)).long() - bands
    place_T = torch.arange(steps, device=x.device)
    around_PT = (place_T - by_P[:, None]) % items.steps_P.clamp(min=1)[:, None]
    from_PT = torch.where(place_T < items.steps_P[:, None], around_PT, place_T)
    from_PF = torch.arange(size, device=x.device) - up_P[:, None]
    inside_PF = (from_PF >= 0) & (from_PF < size)
    row_P11 = torch.arange(len(x), device=x.device)[:, None, None]
    moved = x[row_P11, 0, from_PT[:, :, None], from_PF.clamp(0, size - 1)[:, None]]
    return (moved * inside_PF[:, None])[:, None]


def mel_mix(x: Tensor, items: Items, share: float = 0.25) -> Tensor:
    """Add the other sound, scaled to `share` of this one's energy (the sum over all cells)."""
    own, theirs = (s.sum((1, 2, 3), keepdim=True) for s in (x, items.other))
    return x + share * own / theirs.clamp(min=_SILENT) * items.other


OPS: dict[str, Callable[..., Tensor]] = {
    "mel_noise": mel_noise,
    "mel_shift": mel_shift,
    "mel_mix": mel_mix,
}


def chosen(augments: Sequence[AugmentSpec]) -> list[AugmentSpec]:
    """Those of a view's augmentations that change its mel spectrogram."""
    return [augment for augment in augments if augment.kind in OPS]


def apply(x: Tensor, items: Items, augments: Sequence[AugmentSpec]) -> Tensor:
    """The linear mel spectrograms behind the augmentations, in their order."""
    for augment in augments:
        x = OPS[augment.kind](x, items, **augment.options)
    return x
