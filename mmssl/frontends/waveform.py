"""Raw waveforms as one-axis signals."""

from __future__ import annotations

from torch import Tensor, nn

from mmssl.frontends.patches import zero_behind
from mmssl.frontends.spectra import mono


class Waveform(nn.Module):
    """(P, S) samples in [-1, 1] to (P, 1, S), in fp32; `scale` multiplies."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Axes of the output: (S,)."""
        return shape

    def out_lengths(self, lengths_P: Tensor) -> Tensor:
        """Valid samples: the same."""
        return lengths_P

    def forward(self, wave_PS: Tensor, lengths_P: Tensor | None = None) -> Tensor:
        """Add the channel axis; samples behind a length are zero.

        Raises:
            UserError: several channels.
        """
        return zero_behind(mono(wave_PS).float() * self.scale, lengths_P, axis=1).unsqueeze(1)
