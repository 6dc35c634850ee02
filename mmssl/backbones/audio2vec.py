"""Audio2Vec's encoder of spectrogram slices. P items, T frames, F bands, N slices, D width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.backbones.convnets import MapBatchNorm, he_normal, step_mask
from mmssl.frontends.lengths import Field, stack_field, stack_length
from mmssl.frontends.patches import dtype_of, stack_lengths, zero_behind
from mmssl.types import UserError


class SeparableBlock(nn.Module):
    """Convolutions over 3 frames and then over 3 bands, each with batch norm and ReLU.

    The first changes the number of channels. mirrored: the reverse, of a decoder. bare: no norm and
    ReLU behind the second, which has a bias.
    """

    def __init__(
        self, inputs: int, outputs: int, mirrored: bool = False, bare: bool = False
    ) -> None:
        super().__init__()
        kernels = [(1, 3), (3, 1)] if mirrored else [(3, 1), (1, 3)]
        widths = [inputs, inputs if mirrored else outputs, outputs]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, (t, f) in enumerate(kernels):
            last = bare and i == 1
            before, after = widths[i : i + 2]
            conv = nn.Conv2d(before, after, (t, f), padding=(t // 2, f // 2), bias=last)
            self.convs.append(conv if last else he_normal(conv))
            if not last:
                self.norms.append(MapBatchNorm(widths[i + 1]))

    def forward(self, x_PCTF: Tensor, valid_P: Tensor | None = None) -> Tensor:
        """(P, C, T, F) to as many cells; items that are not valid enter no batch statistics."""
        for i, conv in enumerate(self.convs):
            x_PCTF = conv(x_PCTF)
            if i < len(self.norms):
                x_PCTF = F.relu(self.norms[i](x_PCTF, valid_P))
        return x_PCTF


class Audio2Vec(nn.Module):
    """One vector per slice of a spectrogram (Tagliasacchi et al. 2020).

    Separable blocks, each followed by a 2x2 max-pool, then the maximum over all cells and a linear
    map to `width`. A token is one slice of `frames`, every `shift` frames; slices do not see each
    other. channels: of the blocks.
    """

    def __init__(
        self,
        in_channels: int = 1,
        bands: int = 64,
        frames: int = 96,
        shift: int = 96,
        channels: Sequence[int] = (64, 128, 256, 256, 512),
        width: int = 128,
    ) -> None:
        super().__init__()
        if min(frames, bands) >> len(channels) == 0:
            raise UserError(
                f"audio2vec: slices of {frames} frames and {bands} bands cannot be halved "
                f"{len(channels)} times; use longer ones, or fewer `channels`"
            )
        self.bands, self.width = bands, width
        self.stack = ([frames], [shift], [0])
        self.blocks = nn.ModuleList(SeparableBlock(*c) for c in pairwise([in_channels, *channels]))
        self.linear = nn.Linear(channels[-1], width)

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along time; all bands at once."""
        return stack_field(*self.stack), Field(self.bands, self.bands, (self.bands - 1) / 2)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Grid (N, 1) of a spectrogram (T, F).

        Raises:
            UserError: another number of bands, or less than a slice.
        """
        count = stack_length(shape[0], *self.stack)
        if len(shape) != 2 or shape[1] != self.bands or count == 0:
            raise UserError(
                f"audio2vec reads a spectrogram of {self.bands} bands and at least "
                f"{self.stack[0][0]} frames, got {tuple(shape)}; set backbone.bands to the "
                "front-end's n_mels, and backbone.frames to the slices' or a longer crop_s"
            )
        return count, 1

    def out_lengths(self, lengths_P: Tensor, rank: int = 2) -> Tensor:
        """Valid slices, at least 1 where there is anything."""
        return stack_lengths(lengths_P, *self.stack)

    def forward(
        self, x_PCTF: Tensor, lengths_P: Tensor | None = None, valid_P: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """(P, C, T, F) to tokens (P, N, D) and their grid, as `ConvNet`."""
        grid, ((size,), (shift,), _) = self.grid(x_PCTF.shape[2:]), self.stack
        x = zero_behind(x_PCTF.to(dtype_of(self)), lengths_P).unfold(2, size, shift)
        there_PN = step_mask(x, None if lengths_P is None else self.out_lengths(lengths_P), valid_P)
        there = None if there_PN is None else there_PN.flatten()
        x = x.permute(0, 2, 1, 4, 3).flatten(0, 1)
        for block in self.blocks:
            x = F.max_pool2d(block(x, there), 2)
        tokens: Tensor = self.linear(torch.amax(x, (2, 3)))
        return tokens.view(-1, grid[0], self.width), grid
