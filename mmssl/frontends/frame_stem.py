"""Frames of a spectrogram to latents: the stem of wav2vec 2.0's kin that hear no raw waveform.

P items, T frames, F features of a frame, E width of a latent, D width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmssl.frontends.lengths import Field
from mmssl.frontends.wave_stem import LatentTokens
from mmssl.objectives.precision import recurrent

Grid = tuple[int, ...]


class FrameStem(nn.Module):
    """One latent per frame, a LayerNorm with dropout (`features`), a linear map to the width.

    layers: 0 = a linear map (Srivastava et al. 2022); else so many LSTM layers, which see the
    past alone (wav2vec-C, Sadhu et al. 2021), so that padding at the end changes nothing.
    features: numbers of a (stacked) frame.
    """

    def __init__(
        self,
        width: int,
        features: int,
        latent: int,
        layers: int = 0,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.strides: Grid = (1, features)
        self.channels = latent
        self.encoder = (
            nn.LSTM(features, latent, layers, batch_first=True)
            if layers
            else nn.Linear(features, latent)
        )
        self.features = nn.LayerNorm(latent, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.proj = nn.Linear(latent, width)

    def grid(self, shape: Sequence[int]) -> Grid:
        """One token per frame of (T, F)."""
        return (shape[0], 1)

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along both axes; the memory does not count."""
        return tuple(Field(size, size, (size - 1) / 2) for size in self.strides)

    def out_lengths(self, lengths_P: Tensor) -> Tensor:
        """Valid tokens: one per frame."""
        return lengths_P

    def project(self, features_PTE: Tensor) -> Tensor:
        """(P, T, E) latents, perhaps masked, to (P, T, D) tokens."""
        out: Tensor = self.proj(features_PTE)
        return out

    def encode(self, x_P1TF: Tensor, lengths_P: Tensor | None = None) -> LatentTokens:
        """Tokens and the latents they are made of; those behind an item's end mean nothing."""
        x_PTF = x_P1TF[:, 0].to(self.proj.weight.dtype)
        lstm = self.encoder if isinstance(self.encoder, nn.LSTM) else None
        raw = self.encoder(x_PTF) if lstm is None else recurrent(lstm, x_PTF)
        features = self.dropout(self.features(raw))
        return LatentTokens(self.project(features), features, raw, self.grid(x_P1TF.shape[2:]))
