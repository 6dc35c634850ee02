"""From tokens to the values of a signal at their time. P items, T tokens, D width, F values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn


class FrameDecoder(nn.Module):
    """A layer of `hidden` PReLUs and a linear map to `ratio` frames of each token."""

    def __init__(self, width: int, bands: int, ratio: int = 1, hidden: int = 256) -> None:
        super().__init__()
        self.ratio = ratio
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.PReLU(), nn.Linear(hidden, ratio * bands)
        )

    def forward(self, x_PTD: Tensor) -> Tensor:
        """(P, T, D) to (P, ratio T, F)."""
        frames: Tensor = self.layers(x_PTD).unflatten(2, (self.ratio, -1))
        return frames.flatten(1, 2)


class WaveDecoder(nn.Module):
    """Transposed convolutions with PReLU, then a layer of `hidden` PReLUs for every sample (PASE).

    `kernel` taps each; the product of the strides is the number of samples of a token.
    """

    def __init__(
        self,
        width: int,
        channels: Sequence[int] = (512, 256, 128),
        strides: Sequence[int] = (4, 4, 10),
        kernel: int = 30,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        self.ratio = prod(strides)
        layers: list[nn.Module] = []
        for (before, after), stride in zip(pairwise([width, *channels]), strides, strict=True):
            layers.append(_Upsample(before, after, kernel, stride))
            layers.append(nn.PReLU(after))
        mlp = [nn.Conv1d(channels[-1], hidden, 1), nn.PReLU(hidden), nn.Conv1d(hidden, 1, 1)]
        self.layers = nn.Sequential(*layers, *mlp)

    def forward(self, x_PTD: Tensor) -> Tensor:
        """(P, T, D) to (P, ratio T, 1)."""
        samples: Tensor = self.layers(x_PTD.transpose(1, 2))
        return samples.transpose(1, 2)


class _Upsample(nn.ConvTranspose1d):
    """`stride` outputs for each input, the excess of the kernel cut off evenly at both ends."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__(inputs, outputs, kernel, stride)

    def forward(self, x_PCT: Tensor) -> Tensor:  # type: ignore[override]
        """(P, C, T) to (P, C', stride T)."""
        whole = super().forward(x_PCT)
        left = (self.kernel_size[0] - self.stride[0]) // 2
        return whole[:, :, left : left + self.stride[0] * x_PCT.shape[2]]
