"""A tower on a transformer or another backbone of tokens.

Letters: P items of a view, N tokens, K kept tokens, M cells of the stem, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from mmssl.backbones.causal import Trunk
from mmssl.backbones.dilated import DilatedConvs
from mmssl.backbones.recurrent import Recurrent
from mmssl.backbones.tokens import DenseGelu, DropToken, ExtraTokens, visible_tokens
from mmssl.frontends.frame_stem import FrameStem
from mmssl.frontends.patches import cells_of, padding_mask
from mmssl.frontends.stems import CellMerge
from mmssl.frontends.summed import SummedEmbedding
from mmssl.frontends.wave_stem import WaveStem
from mmssl.quantizers import Quantizer
from mmssl.rng import row_uniform
from mmssl.schedules import resolve
from mmssl.specs import Number
from mmssl.towers.items import full_padding, item_weight, lengths_if_padded, token_rate_of
from mmssl.towers.masks import Mask, hide_cells, marked
from mmssl.types import Codes, Tokens, ViewBatch

LatentStem = WaveStem | FrameStem


@dataclass(frozen=True)
class Cells:
    """What a stem makes of a signal: (P, M, D) cells of a grid, and the latents behind them.

    features_PME, raw_PME: behind and before the norm of a stem that shows them (`LatentStem`).
    codes: of a quantizer, whose vectors the cells then are.
    """

    x_PMD: Tensor
    grid: tuple[int, ...]
    features_PME: Tensor | None = None
    raw_PME: Tensor | None = None
    codes: Codes | None = None


@dataclass(frozen=True)
class Entry:
    """What enters a tower's backbone, and what it was made of.

    x_PND: tokens with positions; pad_PN: their padding, None without any. signal: what the
    front-end made of the view. cells, cell_pad_PM: what the stem made of that.
    """

    x_PND: Tensor
    pad_PN: Tensor | None
    grid: tuple[int, ...]
    signal: Tensor
    cells: Cells
    cell_pad_PM: Tensor | None


class Tower(nn.Module):
    """Front-end, cut, positions and backbone of one modality.

    The trunk is passed in by the model and is not registered here when it is shared, so that its
    parameters have one name. `width` is the width of the tokens it returns. A quantizer, with its
    temperature, turns the stem's cells into codes, which the backbone then reads.
    """

    def __init__(
        self,
        modality: str,
        signal: nn.Module | None,
        stem: nn.Module,
        positions: nn.Module | None,
        extra: ExtraTokens,
        trunk: Trunk,
        shared: bool,
        drop: Number = 0.0,
        pre: nn.Module | None = None,
        post: DenseGelu | None = None,
        merge: CellMerge | None = None,
        quantizer: Quantizer | None = None,
        temperature: Number = 1.0,
    ) -> None:
        super().__init__()
        self.modality, self.merge = modality, merge
        self.quantizer, self.temperature = quantizer, temperature
        self.signal, self.stem, self.positions, self.extra = signal, stem, positions, extra
        self.own_trunk = None if shared else trunk
        self._trunk = (trunk,)  # a tuple hides the shared trunk from this module's parameters
        self.drop, self.dropper = drop, DropToken()
        self.pre, self.post = pre, post
        self.entry_width, self.trunk_width = entry_width(trunk), trunk.width
        self.width = trunk.width if post is None else post.linear.out_features

    @property
    def trunk(self) -> Trunk:
        """The backbone, shared or not."""
        return self._trunk[0]

    @property
    def latent_width(self) -> int | None:
        """Width of the stem's latents, None where it shows none."""
        return self.stem.channels if isinstance(self.stem, LatentStem) else None

    def grid_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Token grid of one item whose data has this shape."""
        axes = tuple(shape) if self.signal is None else self.signal.grid(tuple(shape))  # type: ignore[operator]
        grid: tuple[int, ...] = self.stem.grid(axes)  # type: ignore[operator]
        return grid if self.merge is None else self.merge.grid(grid)

    @property
    def cell(self) -> tuple[int, ...]:
        """Inputs of the stem per token along each axis (frames, bands, pixels)."""
        time, *space = self.stem.strides  # type: ignore[misc]
        if self.merge is None:
            return (time, *space)
        return (time * self.merge.time, *(self.merge.space * step for step in space))

    def inputs(self, view: ViewBatch) -> Tensor:
        """The stem's input: (P, C, *axes) signal, or (P, N) ids; zero behind an item's end."""
        if view.signal is not None:
            return view.signal
        if self.signal is None:
            return view.data
        out: Tensor = self.signal(view.data, lengths_if_padded(view))
        return out

    def encode(self, view: ViewBatch, position: float, mask: Mask | None = None) -> Tokens:
        """Encode the P items of a view.

        position: share of the run that is done, for scheduled numbers. A pass that does not read
        one of the global tokens simply leaves it; registers are thrown away.
        """
        entry = self.enter(view, mask, position)
        cells = entry.cells
        x, index, kept_pad = self._kept(entry, view, position, mask)
        x, front_pad = self.extra(x, kept_pad, self.extra.names)
        x, _ = self.trunk(x, front_pad, modality=self.modality)
        if self.post is not None:
            x = self.post(x)
        named, tokens = self.extra.split(x, self.extra.names)
        pad = entry.pad_PN
        if index is not None:
            tokens, pad = _scatter(tokens, index, kept_pad, prod(entry.grid))
        return Tokens(
            x_PND=tokens,
            pad_PN=full_padding(pad, tokens),
            stem_PMD=cells.x_PMD,
            stem_pad_PM=full_padding(entry.cell_pad_PM, cells.x_PMD),
            grid=entry.grid,
            stem_grid=cells.grid,
            extra=named,
            rate_hz=self.token_rate(view.rate),
            stem_rate_hz=self.token_rate(view.rate)
            * (1 if self.merge is None else self.merge.time),
            view=view,
            hide=None if mask is None else mask.hide,
            features_PNE=cells.features_PME,
            raw_PNE=cells.raw_PME,
            codes=cells.codes,
            motion_PM=None if mask is not None else self._motion(entry.signal, cells.grid),
        )

    def layers(self, view: ViewBatch) -> tuple[list[Tensor], Tensor]:
        """What enters the backbone and the output of each of its layers, before a final norm.

        Returns:
            (P, N, D) tensors, the input first, without global tokens; and padding (P, N).
        """
        entry = self.enter(view)
        names = self.extra.names
        x, pad = self.extra(entry.x_PND, entry.pad_PN, names)
        _, hidden = self.trunk(x, pad, modality=self.modality, return_hidden=True)
        found = [entry.x_PND, *(self.extra.split(h, names)[1] for h in hidden)]
        return found, full_padding(entry.pad_PN, entry.x_PND)

    def enter(self, view: ViewBatch, mask: Mask | None = None, position: float = 1.0) -> Entry:
        """What enters the backbone: cells of the stem, merged and marked, with positions.

        position: as in `encode`.
        """
        signal = self.inputs(view) if mask is None or mask.altered is None else mask.altered
        if mask is not None and mask.altered is None and mask.hide == "cells":
            grid = self.grid_of(view.data.shape[1:])
            signal = hide_cells(signal, mask.hidden_PN, grid, self.cell)
        cells = self._cells(signal, self._frames(view), view.split_P)
        bins = self._bins(view)
        stem_pad = None if bins is None else padding_mask(bins, cells.grid)
        if self.quantizer is not None:
            cells = self._quantised(self.quantizer, cells, stem_pad, view, position)
        x, grid = cells.x_PMD, cells.grid
        if self.merge is not None:
            x, grid = self.merge(x, grid, stem_pad)
        pad = None if bins is None else padding_mask(self._steps(bins), grid)
        if mask is not None and mask.hide == "features" and mask.embedding_D is not None:
            assert cells.features_PME is not None  # `build` refuses other stems
            x, mask = self.stem.project(marked(cells.features_PME, mask)), None  # type: ignore[operator]
        x = self._placed(x, grid, pad, mask)
        return Entry(x, pad, grid, signal, cells, stem_pad)

    def unmasked(self, view: ViewBatch, tokens: Tokens, altered: bool) -> Entry:
        """What enters the backbone without a mask, of a view that a masked pass has read.

        A mask of latents or of tokens leaves the stem's cells as they are, which then serve again.

        altered: the masked pass read another input.
        """
        if altered or tokens.hide == "cells" or self.merge is not None:
            return self.enter(view)
        cells = Cells(tokens.stem_PMD, tokens.grid)
        pad = tokens.stem_pad_PM
        return Entry(
            self._placed(cells.x_PMD, cells.grid, pad), pad, cells.grid, cells.x_PMD, cells, pad
        )

    def _motion(self, signal: Tensor, grid: tuple[int, ...]) -> Tensor | None:
        """(P, M) mean of the front-end's motion channel inside each cell of the stem."""
        channel = getattr(self.signal, "motion_channel", None)
        if channel is None:
            return None
        return cells_of(signal[:, channel : channel + 1], grid, self.stem.strides).mean(-1)  # type: ignore[arg-type]

    def _cells(self, signal: Tensor, frames_P: Tensor | None, split_P: Tensor | None) -> Cells:
        """The stem's cells; a stem that shows its latents gives them along."""
        if isinstance(self.stem, SummedEmbedding):
            return Cells(*self.stem(signal, split_P))
        if isinstance(self.stem, LatentStem):
            out = self.stem.encode(signal, frames_P)
            return Cells(out.tokens_PND, out.grid, out.features_PTC, out.raw_PTC)
        return Cells(*(self.stem(signal) if self.signal is None else self.stem(signal, frames_P)))

    def _quantised(
        self,
        quantizer: Quantizer,
        cells: Cells,
        pad_PM: Tensor | None,
        view: ViewBatch,
        position: float,
    ) -> Cells:
        """The cells as vectors of a codebook; those of padding and of dummy items are zero."""
        valid_PM = (item_weight(view) > 0)[:, None] & ~full_padding(pad_PM, cells.x_PMD)
        noise = quantizer.noise(view.seeds_P, valid_PM.shape[1]) if self.training else None
        tau = resolve(self.temperature, position)
        codes: Codes = quantizer(cells.x_PMD, valid_PM, tau, noise)
        return replace(cells, x_PMD=codes.vectors_PNQ.to(cells.x_PMD.dtype), codes=codes)

    def _placed(
        self, x_PND: Tensor, grid: tuple[int, ...], pad: Tensor | None, mask: Mask | None = None
    ) -> Tensor:
        """Tokens as they enter the backbone: mapped, marked where they are hidden, placed."""
        if self.pre is not None:
            x_PND = self.pre(x_PND)
        if mask is not None and mask.embedding_D is not None:
            x_PND = marked(x_PND, mask)
        return x_PND if self.positions is None else self.positions(x_PND, grid, pad)

    def frames(self, view: ViewBatch) -> Tensor:
        """(P,) valid inputs of the stem along time: frames of a spectrogram or a video, samples."""
        lengths: Tensor = view.lengths_P
        if self.signal is not None:
            lengths = self.signal.out_lengths(lengths)  # type: ignore[operator]
        return lengths

    def _frames(self, view: ViewBatch) -> Tensor | None:
        """(P,) valid inputs of the stem along time, None when every item is full."""
        return None if lengths_if_padded(view) is None else self.frames(view)

    def padding(self, view: ViewBatch, grid: tuple[int, ...]) -> Tensor | None:
        """(P, N) padding of the tokens, or None when every item fills the grid."""
        bins = self._bins(view)
        return None if bins is None else padding_mask(self._steps(bins), grid)

    def _steps(self, bins_P: Tensor) -> Tensor:
        """(P,) token steps of so many time bins of the stem."""
        return bins_P if self.merge is None else self.merge.out_lengths(bins_P)

    def _bins(self, view: ViewBatch) -> Tensor | None:
        """(P,) valid time bins of the stem, at least one; None when every item is full."""
        frames = self._frames(view)
        if frames is None:
            return None
        steps: Tensor = frames if self.signal is None else self.stem.out_lengths(frames)  # type: ignore[operator]
        return steps.clamp(min=1)

    def _kept(
        self, entry: Entry, view: ViewBatch, position: float, mask: Mask | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tokens that enter the backbone, their places (None: all) and their padding."""
        x, pad = entry.x_PND, entry.pad_PN
        if mask is not None and mask.hide == "drop":
            return visible_tokens(x, mask.hidden_PN, pad)
        uniform = None
        drop = resolve(self.drop, position) if mask is None else 0.0  # hidden tokens are predicted
        if self.training and drop > 0:
            uniform = row_uniform(view.seeds_P, x.shape[1], "drop")
        x, index, pad = self.dropper(x, uniform, drop, pad)
        return x, index, pad

    def token_rate(self, rate: float) -> float:
        """Tokens per second along the time axis of a view of that rate (Hz, frames per second)."""
        return token_rate_of(rate, self.signal, self.cell[0])

    def first_centre(self) -> float:
        """Centre of the stem's first cell along time, in cells."""
        frame = getattr(self.signal, "first_centre", 0.0)
        if not hasattr(self.stem, "fields"):
            return frame
        field = self.stem.fields()[0]  # type: ignore[operator]
        return float((field.first + frame) / field.stride)


def _scatter(
    x_PKD: Tensor, index_PK: Tensor, pad_PK: Tensor | None, tokens: int
) -> tuple[Tensor, Tensor]:
    """Kept tokens back to their places on the grid; dropped places are padding."""
    full = x_PKD.new_zeros(x_PKD.shape[0], tokens, x_PKD.shape[-1])
    full = full.scatter(1, index_PK[..., None].expand_as(x_PKD), x_PKD)
    pad = torch.ones(full.shape[:2], dtype=torch.bool, device=full.device)
    kept = torch.zeros_like(index_PK, dtype=torch.bool) if pad_PK is None else pad_PK
    return full, pad.scatter(1, index_PK, kept)


def entry_width(trunk: Trunk) -> int:
    """Width of the tokens that a trunk reads."""
    return trunk.width_in if isinstance(trunk, Recurrent | DilatedConvs) else trunk.width
