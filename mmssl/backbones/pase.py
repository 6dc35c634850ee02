"""PASE's encoder of raw speech. P items, S samples, C channels, T steps, D width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.backbones.convnets import MapBatchNorm, step_mask
from mmssl.frontends.lengths import Field, stack_field, stack_length
from mmssl.frontends.patches import dtype_of, stack_lengths
from mmssl.frontends.sinc import SincConv
from mmssl.types import UserError


class PASE(nn.Module):
    """Sinc filters, convolutions and a linear map (Pascual et al. 2019).

    Each layer is followed by batch norm and PReLU, the linear map by batch norm without scale and
    shift. Layers see the sound reflected at the ends of an item, and their norms count valid steps
    only: padding changes nothing.

    filters, kernel: of the sinc filters, of stride 1. channels, kernels, strides: of the others.
    width: of a token.
    """

    def __init__(
        self,
        in_channels: int = 1,
        sample_rate: int = 16000,
        filters: int = 64,
        kernel: int = 251,
        channels: Sequence[int] = (64, 128, 128, 256, 256, 512, 512),
        kernels: Sequence[int] = (20, 11, 11, 11, 11, 11, 11),
        strides: Sequence[int] = (10, 2, 1, 2, 1, 2, 2),
        width: int = 100,
    ) -> None:
        super().__init__()
        sizes, widths = [kernel, *kernels], [filters, *channels]
        self.width, self.stack = width, (sizes, [1, *strides], [(k - 1) // 2 for k in sizes])
        self.sinc = SincConv(filters, kernel, sample_rate)
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, k, s)
            for (a, b), k, s in zip(pairwise(widths), kernels, strides, strict=True)
        )
        self.norms = nn.ModuleList(MapBatchNorm(channels) for channels in widths)
        self.activations = nn.ModuleList(nn.PReLU(channels) for channels in widths)
        self.out = nn.Conv1d(widths[-1], width, 1)
        self.out_norm = MapBatchNorm(width, affine=False)

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along time."""
        return (stack_field(*self.stack),)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Grid (T,) of a waveform (S,).

        Raises:
            UserError: it is too short to be reflected at its ends.
        """
        length, fits = shape[0], len(shape) == 1
        for kernel, stride, padding in zip(*self.stack, strict=True):
            fits = fits and length > padding
            length = stack_length(length, [kernel], [stride], [padding])
        if not fits:
            raise UserError(
                f"pase reads a waveform whose ends it can reflect in every layer, got "
                f"{tuple(shape)}; set frontend.kind: waveform and a longer crop_s"
            )
        return (length,)

    def out_lengths(self, lengths_P: Tensor, rank: int = 1) -> Tensor:
        """Valid steps, at least 1 where there is anything."""
        return stack_lengths(lengths_P, *self.stack)

    def forward(
        self, x_P1S: Tensor, lengths_P: Tensor | None = None, valid_P: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """(P, 1, S) to tokens (P, T, D) and their grid, as `ConvNet`."""
        grid, x = self.grid(x_P1S.shape[2:]), x_P1S
        there = None
        for i, (kernel, stride, padding) in enumerate(zip(*self.stack, strict=True)):
            x = reflected(x, padding, lengths_P)
            x = self.convs[i - 1](x) if i else self.sinc(x).to(dtype_of(self.convs))
            if lengths_P is not None:
                lengths_P = stack_lengths(lengths_P, [kernel], [stride], [padding])
            there = step_mask(x, lengths_P, valid_P)
            x = self.activations[i](self.norms[i](x, there))
        out: Tensor = self.out_norm(self.out(x), there)
        return out.transpose(1, 2), grid


def reflected(x_PCT: Tensor, padding: int, lengths_P: Tensor | None) -> Tensor:
    """`padding` more steps on both sides, mirrored at an item's ends.

    Where an item is shorter than that its first step is repeated.
    """
    if lengths_P is None:
        return F.pad(x_PCT, (padding, padding), mode="reflect")
    steps = torch.arange(-padding, x_PCT.shape[2] + padding, device=x_PCT.device).abs()
    last_P1 = lengths_P[:, None].clamp(min=1) - 1
    index = torch.where(steps > last_P1, 2 * last_P1 - steps, steps).clamp(min=0)
    return x_PCT.gather(2, index[:, None].expand(-1, x_PCT.shape[1], -1))
