"""A tower over the tokens of several views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmssl.backbones.tokens import ExtraTokens
from mmssl.backbones.transformer import Transformer


class JointTower(nn.Module):
    """A transformer over the tokens of several views, e.g. audio + video against text.

    Every part is normed, mapped to the trunk's width and given a learned vector that says which
    modality it is.
    """

    def __init__(
        self, of: Sequence[str], widths: Mapping[str, int], extra: ExtraTokens, trunk: Transformer
    ) -> None:
        super().__init__()
        self.of = tuple(of)
        self.maps = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.LayerNorm(widths[name]), nn.Linear(widths[name], trunk.width)
                )
                for name in of
            }
        )
        self.kinds = nn.Parameter(torch.randn(len(self.of), trunk.width) * 0.02)
        self.extra, self.trunk = extra, trunk
        self.width = trunk.width

    def forward(self, parts: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """{view: (x_RND, pad_RN)} of R rows to the global tokens {name: (R, D)}."""
        rows, pads = [], []
        for i, name in enumerate(self.of):
            x, pad = parts[name]
            rows.append(self.maps[name](x) + self.kinds[i])
            pads.append(pad)
        x, pad = self.extra(torch.cat(rows, 1), torch.cat(pads, 1), self.extra.names)
        x, _ = self.trunk(x, pad)
        return self.extra.split(x, self.extra.names)[0]
