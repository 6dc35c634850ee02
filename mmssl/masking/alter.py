"""Alterations of spectrogram frames and the cells to reconstruct.

Letters in shapes: P rows, T frames, F features of a frame (bins, deltas, stacked frames), K bands
or spans.

Four parts, each a function of a row's own seed and length, joined by `FrameAlteration`:

    Mockingjay       FrameAlteration(time=TimeSpans())
    Audio ALBERT     FrameAlteration(time=TimeSpans(length=1))  # on stacked frames
    TERA             FrameAlteration(TimeSpans(), FrequencyBand(), noise=MagnitudeNoise())
    DAPC (toy)       FrameAlteration(masks=SpecMasks(2, 5, 2, 40))
    SpecAugment LD   SpecMasks(2, 27, 2, 100)  # the mask alone

Hidden cells are set to 0, which is the mean of features normalised per utterance. Padding is never
altered and never a cell of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmssl.masking.order import LAST, first, upto
from mmssl.masking.spans import cover, starts_that_fit
from mmssl.rng import row_bits, row_uniform


class Altered(NamedTuple):
    """x_PTF: the frames to read instead; loss_PTF: bool, the cells to reconstruct."""

    x_PTF: Tensor
    loss_PTF: Tensor


@dataclass(frozen=True)
class TimeSpans:
    """Spans of frames (Mockingjay, Liu et al. 2020; TERA, 2021).

    round(share * L / length), at least one, distinct starts in [0, L - length) of an utterance of
    L frames; spans may overlap, so that 13 to 14.5 % are chosen for share 0.15, length 7. One dice
    per utterance: with probability `zero` the chosen frames are set to 0, with `swap` each span is
    replaced by a random span of the same utterance, else nothing is altered. The chosen frames
    count in the loss in all three cases. An utterance not longer than a span is chosen whole.
    """

    share: float = 0.15
    length: int = 7
    zero: float = 0.8
    swap: float = 0.1

    def starts(self, lengths_P: Tensor, frames: int, seeds_P: Tensor, stream: str) -> Tensor:
        """(P, T) bool: a span starts here."""
        count_P = (self.share * lengths_P.double() / self.length).round().long().clamp(min=1)
        fits_PT = starts_that_fit(lengths_P, self.length, frames)
        return first(row_bits(seeds_P, frames, stream + "/start"), fits_PT, count_P)

    def __call__(self, x_PTF: Tensor, lengths_P: Tensor, seeds_P: Tensor, stream: str) -> Altered:
        """The altered frames and the chosen ones."""
        frames = x_PTF.shape[1]
        start_PT = self.starts(lengths_P, frames, seeds_P, stream)
        chosen_PT = cover(start_PT, self.length) & _valid(x_PTF, lengths_P)
        dice_P1 = row_uniform(seeds_P, 1, stream + "/dice")
        zero_PT = chosen_PT & (dice_P1 < self.zero)
        swap_PT = chosen_PT & (dice_P1 >= self.zero) & (dice_P1 < self.zero + self.swap)
        place_T = torch.arange(frames, device=x_PTF.device)
        source_PT = torch.where(
            swap_PT, self._source(start_PT, lengths_P, seeds_P, stream), place_T
        )
        x_PTF = x_PTF.gather(1, source_PT[:, :, None].expand_as(x_PTF))
        loss_PTF = chosen_PT[:, :, None].expand_as(x_PTF)
        return Altered(x_PTF.masked_fill(zero_PT[:, :, None], 0.0), loss_PTF)

    def _source(self, start_PT: Tensor, lengths_P: Tensor, seeds_P: Tensor, stream: str) -> Tensor:
        """(P, T) the frame that replaces each chosen one; where spans overlap the later one rules.

        The k-th span takes the k-th of the places where a span fits, in random order.
        """
        frames = start_PT.shape[1]
        place_T = torch.arange(frames, device=start_PT.device)
        begin_PT = torch.where(start_PT, place_T, -1).cummax(1).values
        fits_PT = starts_that_fit(lengths_P, self.length, frames)
        order_PT = row_bits(seeds_P, frames, stream + "/source")
        donor_PT = torch.where(fits_PT, order_PT, LAST).argsort(dim=1, stable=True)
        span_PT = (start_PT.cumsum(1) - 1).clamp(min=0)
        # Frames outside the spans get some frame or other; nobody reads it.
        return (donor_PT.gather(1, span_PT) + place_T - begin_PT).clamp(max=frames - 1)


@dataclass(frozen=True)
class FrequencyBand:
    """One band of features set to 0 in all frames (TERA): width uniform in {0 .. int(share * F)}.

    Its first feature is uniform among those where it fits; width 0 alters nothing.
    """

    share: float = 0.2

    def bands(self, features: int, seeds_P: Tensor, stream: str) -> Tensor:
        """(P, F) bool: the hidden features."""
        u_P2 = row_uniform(seeds_P, 2, stream + "/band")
        width_P1 = upto(u_P2[:, :1], int(self.share * features))
        return _ranges(upto(u_P2[:, 1:], features - width_P1), width_P1, features)

    def __call__(self, x_PTF: Tensor, lengths_P: Tensor, seeds_P: Tensor, stream: str) -> Altered:
        """The altered frames and the hidden cells."""
        band_PF = self.bands(x_PTF.shape[2], seeds_P, stream)
        hidden_PTF = band_PF[:, None, :] & _valid(x_PTF, lengths_P)[:, :, None]
        return Altered(x_PTF.masked_fill(hidden_PTF, 0.0), hidden_PTF)


@dataclass(frozen=True)
class SpecMasks:
    """Frequency and time masks of SpecAugment (Park et al. 2019), without the time warp.

    `bands` times, a band of width uniform in {0 .. band_width}; `spans` times, a span of width
    uniform in {0 .. min(span_width, int(span_share * L))} of an utterance of L frames (both ends
    included, unlike torchaudio); each at a uniform place inside the valid cells. The published
    policies: LB (1, 27, 1, 100), LD (2, 27, 2, 100), SM (2, 15, 2, 70, 0.2), SS (2, 27, 2, 70,
    0.2).
    """

    bands: int = 2
    band_width: int = 27
    spans: int = 2
    span_width: int = 100
    span_share: float = 1.0

    def features(self, features: int, seeds_P: Tensor, stream: str) -> Tensor:
        """(P, F) bool: the features that the bands hide."""
        u_PK = row_uniform(seeds_P, 2 * self.bands, stream + "/bands")
        width_PK = upto(u_PK[:, : self.bands], min(self.band_width, features))
        return _ranges(upto(u_PK[:, self.bands :], features - width_PK), width_PK, features)

    def frames(self, lengths_P: Tensor, frames: int, seeds_P: Tensor, stream: str) -> Tensor:
        """(P, T) bool: the frames that the spans hide."""
        u_PK = row_uniform(seeds_P, 2 * self.spans, stream + "/spans")
        cap_P = (self.span_share * lengths_P.double()).long().clamp(max=self.span_width)
        width_PK = upto(u_PK[:, : self.spans], cap_P[:, None])
        start_PK = upto(u_PK[:, self.spans :], lengths_P[:, None] - width_PK)
        return _ranges(start_PK, width_PK, frames)

    def __call__(self, x_PTF: Tensor, lengths_P: Tensor, seeds_P: Tensor, stream: str) -> Altered:
        """The frames with hidden cells set to 0, and the hidden cells; possibly none."""
        features_PF = self.features(x_PTF.shape[2], seeds_P, stream)
        frames_PT = self.frames(lengths_P, x_PTF.shape[1], seeds_P, stream)
        hidden_PTF = features_PF[:, None, :] | frames_PT[:, :, None]
        hidden_PTF = hidden_PTF & _valid(x_PTF, lengths_P)[:, :, None]
        return Altered(x_PTF.masked_fill(hidden_PTF, 0.0), hidden_PTF)


@dataclass(frozen=True)
class MagnitudeNoise:
    """White Gaussian noise on all cells of some utterances (TERA); no cell of the loss.

    One dice per utterance. `std` presumes features of unit variance.
    """

    probability: float = 0.15
    std: float = 0.2

    def __call__(self, x_PTF: Tensor, lengths_P: Tensor, seeds_P: Tensor, stream: str) -> Altered:
        """The frames with noise; no cell of the loss."""
        row_R = (row_uniform(seeds_P, 1, stream + "/dice")[:, 0] < self.probability).nonzero()[:, 0]
        shape = (len(row_R), *x_PTF.shape[1:])
        u = row_uniform(seeds_P[row_R], shape[1] * shape[2], stream + "/noise").reshape(shape)
        # u is a multiple of 2^-24: its half step keeps it off 0, whose quantile is infinite.
        noise = torch.special.ndtri(u.double() + 2.0**-25).to(x_PTF.dtype) * self.std
        noise = noise * _valid(x_PTF, lengths_P)[row_R, :, None]
        x_PTF = x_PTF.index_add(0, row_R, noise)
        return Altered(x_PTF, torch.zeros_like(x_PTF, dtype=torch.bool))


class FrameAlteration:
    """Alters frames by the given parts, in the order of the arguments.

    The cells of the loss are the union of the parts' cells. A row with valid frames always has
    some: where its parts chose none (noise alone, a band of width 0), all its valid cells count.

    Args:
        time: spans of frames.
        frequency: one band of features.
        masks: SpecAugment's masks.
        noise: noise on the altered frames.

    Raises:
        ValueError: no part is given.
    """

    def __init__(
        self,
        time: TimeSpans | None = None,
        frequency: FrequencyBand | None = None,
        masks: SpecMasks | None = None,
        noise: MagnitudeNoise | None = None,
    ) -> None:
        given = {"time": time, "frequency": frequency, "masks": masks, "noise": noise}
        self.parts = {name: part for name, part in given.items() if part is not None}
        if not self.parts:
            raise ValueError(f"FrameAlteration: give at least one of {', '.join(given)}")

    def __call__(
        self, x_PTF: Tensor, lengths_P: Tensor, seeds_P: Tensor, stream: str = "alter"
    ) -> Altered:
        """The altered frames and the cells of the loss.

        Args:
            x_PTF: frames, padded at the end; not changed.
            lengths_P: int64 valid frames of each row.
            seeds_P: int64 row seeds.
            stream: name of the random stream.
        """
        valid_PT1 = _valid(x_PTF, lengths_P)[:, :, None]
        loss_PTF = torch.zeros_like(x_PTF, dtype=torch.bool)
        for name, part in self.parts.items():
            x_PTF, cells_PTF = part(x_PTF, lengths_P, seeds_P, f"{stream}/{name}")
            loss_PTF = loss_PTF | cells_PTF
        none_P11 = ~loss_PTF.flatten(1).any(1)[:, None, None]
        return Altered(x_PTF, loss_PTF | (none_P11 & valid_PT1))


def _valid(x_PTF: Tensor, lengths_P: Tensor) -> Tensor:
    """(P, T) bool: the frame is no padding."""
    return torch.arange(x_PTF.shape[1], device=x_PTF.device) < lengths_P[:, None]


def _ranges(start_PK: Tensor, width_PK: Tensor, n: int) -> Tensor:
    """(P, n) bool: inside one of K ranges."""
    place_N = torch.arange(n, device=start_PK.device)
    start, width = start_PK[:, :, None], width_PK[:, :, None]
    return ((place_N >= start) & (place_N < start + width)).any(1)
