"""T5's learned relative position bias (Raffel et al. 2020, section 2.1), bidirectional.

H heads, N tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def relative_buckets(tokens: int, buckets: int = 32, max_distance: int = 64) -> Tensor:
    """(N, N) bucket of key minus query position.

    Half of the buckets serve each sign; of these, half hold one distance each and the rest grow
    logarithmically up to `max_distance`, beyond which all distances share the last bucket.
    """
    places = torch.arange(tokens)
    delta = places[None, :] - places[:, None]
    half = buckets // 2
    exact = half // 2
    distance = delta.abs()
    ratio = (distance.clamp(min=1).double() / exact).log() / math.log(max_distance / exact)
    coarse = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, coarse) + half * (delta > 0)


class RelativeBias(nn.Module):
    """(1, H, N, N) additive attention bias, one learned number per head and bucket."""

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 64) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.table = nn.Embedding(buckets, heads)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, tokens: int) -> Tensor:
        """Bias of a sequence of that many tokens."""
        index = relative_buckets(tokens, self.buckets, self.max_distance)
        bias: Tensor = self.table(index.to(self.table.weight.device))
        return bias.permute(2, 0, 1).unsqueeze(0)
