"""What training does to the spectrograms of a tower's views before the tower reads them.

P items, B rows, S samples, T frames, F bands, K entries of the bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl import dist
from mmssl.banks import Fifo
from mmssl.rng import row_uniform
from mmssl.types import ViewBatch
from mmssl.views.spec import linear_fader, mix_exp, random_resize_crop

_EPS = 1e-7


class SpectrumAugment(nn.Module):
    """BYOL-A's chain: mixing with earlier inputs, random resize crop, fader, standardisation.

    All views of the tower go through it, each with its own draws. Items shorter than the view are
    silent behind their end, and whole afterwards.

    shape: (S, T, F) of one item. mix: largest share of the other sound, 0 = off. bank: so many
    inputs of the first view, as they were before mixing, from which the other sound is drawn; only
    inputs of earlier steps, so that none is mixed with itself. canvas, time, bands: of
    `mmssl.views.spec.random_resize_crop`; canvas 0 = off. fader: of `linear_fader`, 0 = off.
    standardize: by one mean and deviation over all values of all views and ranks.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        mix: float = 0.4,
        bank: int = 2048,
        canvas: float = 1.5,
        time: tuple[float, float] = (0.6, 1.5),
        bands: tuple[float, float] = (0.6, 1.5),
        fader: float = 0.0,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        self.samples, *axes = shape
        self.mix, self.fader, self.standardize = mix, fader, standardize
        self.canvas, self.time, self.bands = canvas, time, bands
        self.bank = Fifo(bank, axes) if mix else None

    @torch.no_grad()
    def forward(
        self,
        views: Mapping[str, ViewBatch],
        signal: nn.Module,
        source_B: Tensor,
        position: float,
    ) -> dict[str, ViewBatch]:
        """The views with `signal` filled in.

        signal: the tower's front-end. position: as in `Fifo.offer`.
        """
        whole = {name: self._whole(view) for name, view in views.items()}
        plain = {name: signal(view.data, None) for name, view in whole.items()}
        varied = {name: self._varied(x, whole[name].seeds_P) for name, x in plain.items()}
        if self.bank is not None:
            first = next(iter(whole))
            self._offer(self.bank, plain[first], whole[first], source_B, position)
        if self.standardize:
            varied = _standardised(varied, whole)
        return {name: replace(view, signal=varied[name]) for name, view in whole.items()}

    def write(self) -> None:
        """Take the step's inputs into the bank."""
        if self.bank is not None:
            self.bank.write()

    def _whole(self, view: ViewBatch) -> ViewBatch:
        """The view with every item of full length, silent where it had ended."""
        data_PS = F.pad(view.data, (0, self.samples - view.data.shape[1]))
        inside = torch.arange(self.samples, device=data_PS.device) < view.lengths_P[:, None]
        lengths_P = torch.full_like(view.lengths_P, self.samples)
        return replace(view, data=data_PS * inside, lengths_P=lengths_P)

    def _varied(self, x_P1TF: Tensor, seeds_P: Tensor) -> Tensor:
        if self.bank is not None:
            u_P2 = row_uniform(seeds_P, 2, "mix_exp")
            other_P = (u_P2[:, 1].double() * self.bank.filled).long()
            share_P = self.mix * u_P2[:, 0] * (self.bank.filled > 0)
            x_P1TF = mix_exp(x_P1TF, self.bank.rows_K[other_P][:, None], share_P)
        if self.canvas:
            x_P1TF = random_resize_crop(x_P1TF, seeds_P, self.canvas, self.time, self.bands)
        return linear_fader(x_P1TF, seeds_P, self.fader) if self.fader else x_P1TF

    def _offer(
        self, bank: Fifo, x_P1TF: Tensor, view: ViewBatch, source_B: Tensor, position: float
    ) -> None:
        # By batch row: ranks may hold different numbers of items.
        rows_BTF = x_P1TF.new_zeros(len(source_B), *x_P1TF.shape[2:])
        rows_BTF = rows_BTF.index_put((view.rows_P,), x_P1TF[:, 0])
        bank.offer(rows_BTF, source_B, view.present_B, position)


def _standardised(
    signals: Mapping[str, Tensor], views: Mapping[str, ViewBatch]
) -> dict[str, Tensor]:
    """Zero mean and unit variance over all values of present items, of all views and ranks."""
    rows, there = [], []
    for name, x_P1TF in signals.items():
        view = views[name]
        rows.append(x_P1TF.flatten(1).double())
        there.append(view.present_BL[view.rows_P, view.slots_P])
    x_PN, there_P1 = torch.cat(rows), torch.cat(there)[:, None]
    mean_N, var_N, _ = dist.moments(x_PN.where(there_P1, 0.0), there_P1)
    mean = mean_N.mean()
    std = (var_N.mean() + (mean_N - mean).square().mean()).sqrt() + _EPS
    return {name: ((x.double() - mean) / std).to(x.dtype) for name, x in signals.items()}
