"""BYOL-A's encoders of log-mel spectrograms. P items, T frames, F bands, C channels, D width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmssl.backbones.convnets import ConvNet, MapBatchNorm, Valid, spatial_stack
from mmssl.frontends.lengths import Field
from mmssl.types import UserError


class BYOLA(ConvNet):
    """Convolutions of 3x3 with 2x2 max-pools, then two linear layers per step of time.

    Version 1 (Niizumi et al. 2021) has three convolutions, version 2 (2023) two, and each step is
    what the convolutions make of it beside what the linear layers make of that. One step is 8 or 4
    frames; all bands of it are one vector, so that the grid is (T', 1).

    bands: of the spectrogram. hidden: width of the linear layers.
    """

    def __init__(
        self,
        in_channels: int = 1,
        version: Literal[1, 2] = 1,
        bands: int = 64,
        hidden: int = 2048,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3 if version == 1 else 2):
            conv = nn.Conv2d(64 if i else in_channels, 64, 3, 1, 1)
            layers += [conv, MapBatchNorm(64), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.stack = spatial_stack(self.features)
        self.bands, self.skip = bands, version == 2
        flat = 64 * super().grid((bands, bands))[1]
        self.linear = nn.Sequential(
            nn.Linear(flat, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
        )
        self.width = hidden + (flat if self.skip else 0)

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along time; all bands at once."""
        return super().fields()[0], Field(self.bands, self.bands, (self.bands - 1) / 2)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Grid (T', 1) of a spectrogram (T, F).

        Raises:
            UserError: another number of bands, or no step left.
        """
        if len(shape) != 2 or shape[1] != self.bands:
            raise UserError(
                f"byol_a reads a spectrogram of {self.bands} bands, got {tuple(shape)}; set "
                "backbone.bands to the front-end's n_mels"
            )
        return super().grid(shape)[0], 1

    def _features(self, x: Tensor, valid: Valid | None, frames: int) -> Tensor:
        maps_PCTF = super()._features(x, valid, frames)
        steps_PTD = maps_PCTF.permute(0, 2, 3, 1).flatten(2)  # bands, then channels
        out = self.linear(steps_PTD)
        out = torch.cat([steps_PTD, out], -1) if self.skip else out
        return out.transpose(1, 2)[..., None]
