"""From the tokens of a mixture to the sounds in it: masks on the stem's latents.

P mixtures, N tokens, D width, E channels of a latent, M outputs, S samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmssl.objectives.precision import wide
from mmssl.types import Tokens

Consistency = Literal["none", "equal", "learned"]


class MaskHead(nn.Module):
    """A mask of the latents for every output; the output convolution of Conv-TasNet.

    activation: `relu` or `sigmoid`. consistency: how outputs share what they lack of the mixture:
    alike, or by what a linear map of the mean token says (`learned`).
    """

    def __init__(
        self, width: int, latents: int, outputs: int, activation: str, consistency: Consistency
    ) -> None:
        super().__init__()
        self.outputs, self.activation, self.consistency = outputs, activation, consistency
        self.masks = nn.Linear(width, outputs * latents)
        self.shares = nn.Linear(width, outputs) if consistency == "learned" else None

    def forward(self, tokens: Tokens) -> Tensor:
        """(P, M, N, E) latents of every output; 0 at padding."""
        assert tokens.raw_PNE is not None  # `build` refuses towers without latents
        masks = getattr(torch, self.activation)(self.masks(tokens.x_PND))
        masks_PMNE = masks.unflatten(2, (self.outputs, -1)).transpose(1, 2)
        latents_P1NE = tokens.raw_PNE.masked_fill(tokens.pad_PN[..., None], 0.0).unsqueeze(1)
        out: Tensor = masks_PMNE * latents_P1NE
        return out

    def consistent(self, tokens: Tokens, source_PMS: Tensor, mixture_PS: Tensor) -> Tensor:
        """Outputs whose sum is the mixture, as `consistency` asks (Wisdom et al. 2019)."""
        if self.consistency == "none":
            return source_PMS
        share_PM = source_PMS.new_full(source_PMS.shape[:2], 1 / self.outputs)
        if self.shares is not None:
            valid_PN1 = (~tokens.pad_PN)[..., None]
            mean_PD = (tokens.x_PND * valid_PN1).sum(1) / valid_PN1.sum(1).clamp(min=1)
            share_PM = wide(self.shares(mean_PD)).softmax(-1)
        return source_PMS + share_PM[..., None] * (mixture_PS - source_PMS.sum(1))[:, None]
