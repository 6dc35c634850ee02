"""Predictive latents and hidden frames as target: DAPC.

P items, N tokens, D width of the tower, F width of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.masking import FrameAlteration
from mmssl.objectives.predictive import predictive_information, whiteness
from mmssl.targets.base import Seen
from mmssl.targets.frames import FrameTarget
from mmssl.towers import Mask, item_weight
from mmssl.types import Term


class PredictiveTarget(FrameTarget):
    """Latents whose past tells their future, from which hidden cells can be filled in (Bai 2021).

    Latents are a linear map of the tower's output. A pass that sees everything gives those whose
    predictive information is raised; the masked pass gives those that a decoder (layers with ELU)
    makes frames of. Terms: `predictive`, minus the information in nats; `whiteness`;
    `reconstruction`, the squared error per hidden cell.

    view: the view that is masked. window: tokens of the past, and of the future (T). ridge: see
    `predictive_information`. decoder: widths of its hidden layers.
    """

    weights: ClassVar = {"predictive": 1.0, "whiteness": 0.1, "reconstruction": 500.0}

    def __init__(
        self,
        name: str,
        view: str,
        sizes: tuple[int, int, int],
        decoder: Sequence[int],
        window: int,
        ridge: float,
        alter: FrameAlteration,
    ) -> None:
        width, latents, cell = sizes
        layers: list[nn.Module] = []
        for before, after in zip((latents, *decoder), decoder, strict=False):
            layers += [nn.Linear(before, after), nn.ELU()]
        out = nn.Linear((latents, *decoder)[-1], cell)
        bottleneck = nn.Linear(width, latents)
        super().__init__(name, nn.Sequential(bottleneck, *layers, out), alter)
        self.view, self.window, self.ridge = view, window, ridge

    def forward(self, seen: Seen) -> dict[str, Term]:
        """Information and whiteness of the clean pass, error of the masked one."""
        error_PNK, cells_PNK = self._errors(seen)
        square = torch.where(cells_PNK, error_PNK.square(), torch.zeros_like(error_PNK)).sum()
        z_PNF, valid_PN = self.latents(seen)
        total, count = predictive_information(z_PNF, valid_PN, self.window, self.ridge)
        return {
            "predictive": Term(-total, count),
            "whiteness": Term(*whiteness(z_PNF, valid_PN)),
            "reconstruction": Term(square, cells_PNK.sum().to(square.dtype)),
        }

    def latents(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """(P, N, F) latents of a pass that hides nothing, and which of them count."""
        nothing = Mask(f"{seen.task}/clean", torch.zeros_like(seen.hidden_PN))
        tokens = seen.passes.tokens(self.view, nothing, seen.view)
        present_P1 = (item_weight(seen.view) > 0)[:, None]
        return self.head[0](tokens.x_PND), ~tokens.pad_PN & present_P1
