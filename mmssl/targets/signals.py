"""Signals of a view as targets: frames of a front-end, standardised. P items, T frames, F bands."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl import dist


class Standardize(nn.Module):
    """Zero mean and unit variance of every band over all valid frames of training so far.

    The batch that is standardised counts, too. Evaluation uses what training has counted; before,
    values stay as they are. A band that never varied becomes 0.
    """

    mean_F: Tensor
    var_F: Tensor
    count: Tensor

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(bands))
        self.register_buffer("var_F", torch.ones(bands))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, x_PTF: Tensor, valid_PT: Tensor) -> Tensor:
        """(P, T, F), same shape out; every rank calls it equally often in training."""
        if self.training:
            self._count(x_PTF.double().flatten(0, 1), valid_PT.reshape(-1, 1))
        return (x_PTF - self.mean_F) / self.var_F.sqrt().clamp(min=1e-5)

    def _count(self, x_RF: Tensor, valid_R1: Tensor) -> None:
        """Chan's formula for the moments of two sets of rows."""
        x_RF = torch.where(valid_R1, x_RF, torch.zeros_like(x_RF))
        mean_F, var_F, new = dist.moments(x_RF, valid_R1)
        share = new / (new + self.count).clamp(min=1)
        apart_F = mean_F - self.mean_F
        self.var_F += (share * (var_F - self.var_F + (1 - share) * apart_F.square())).to(self.var_F)
        self.mean_F += (share * apart_F).to(self.mean_F)
        self.count += new.long()
