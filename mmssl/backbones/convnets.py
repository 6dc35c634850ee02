"""Convolutional encoders of published methods; each returns its feature map as a token grid.

P items, C channels, N tokens, D width. A map is (P, C, T, F) for a spectrogram or (P, 3, T, H, W)
for frames, which are folded into the batch: their grid is (T, h, w). Pooling is left to the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from mmssl.dist import MaskedSyncBatchNorm, world_size
from mmssl.frontends.lengths import Field, stack_field, stack_length
from mmssl.frontends.patches import stack_lengths, zero_behind
from mmssl.types import UserError

Grid = tuple[int, ...]
Stack = tuple[list[int], list[int], list[int]]  # kernels, strides, paddings


class MapBatchNorm(MaskedSyncBatchNorm):
    """`MaskedSyncBatchNorm` of a channels-first map (P, C, h, w).

    `valid` (P,) is set by the encoder for one forward, because networks of other libraries pass no
    mask on. Evaluation, and training on one rank with valid items only, use torch's fused kernel.
    """

    valid: Tensor | None = None

    def forward(self, x_PChw: Tensor, valid_P: Tensor | None = None) -> Tensor:
        """Normalise every channel over the places of valid items on all ranks."""
        valid_P = self.valid if valid_P is None else valid_P
        places = x_PChw.shape[0] * prod(x_PChw.shape[2:])
        if not self.training or (valid_P is None and world_size() == 1 and places > 1):
            mean, var = self.running_mean, self.running_var
            if self.training:  # torch updates in place, whatever the input holds
                mean, var = mean.clone(), var.clone()
            out = F.batch_norm(
                x_PChw,
                mean,
                var,
                self.weight.to(mean.dtype),  # statistics stay fp32 in a bf16 model
                self.bias.to(mean.dtype),
                self.training,
                self.momentum,
                self.eps,
            )
            if self.training:
                self._keep(mean, var, torch.ones(1, dtype=torch.bool, device=mean.device))
            return out
        rows = x_PChw.movedim(1, -1)
        if valid_P is not None:
            valid_P = valid_P[:, None, None].expand(rows.shape[:-1])
        return super().forward(rows, valid_P).movedim(-1, 1)


class ConvNet(nn.Module):
    """Base of the encoders: token grids from feature maps, and their arithmetic."""

    width: int
    stack: Stack
    features: nn.Module

    @property
    def strides(self) -> Grid:
        """Inputs per token along both axes of a map."""
        return tuple(field.stride for field in self.fields())

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along both axes of a map."""
        return (stack_field(*self.stack),) * 2

    def grid(self, shape: Sequence[int]) -> Grid:
        """Token grid of a spectrogram (T, F) or of frames (T, H, W).

        Raises:
            UserError: the input is too small for the network.
        """
        out = (*shape[:-2], *(stack_length(n, *self.stack) for n in shape[-2:]))
        if prod(out) == 0:
            raise UserError(
                f"an input of {tuple(shape)} is too small for this network: its grid is {out}"
            )
        return out

    def out_lengths(self, lengths_P: Tensor, rank: int = 2) -> Tensor:
        """Valid tokens along the first axis: steps of a spectrogram (rank 2) or frames (rank 3)."""
        return stack_lengths(lengths_P, *self.stack) if rank == 2 else lengths_P

    def forward(
        self, x: Tensor, lengths_P: Tensor | None = None, valid_P: Tensor | None = None
    ) -> tuple[Tensor, Grid]:
        """(P, C, T, F) or (P, C, T, H, W) to tokens (P, N, D) and their grid.

        lengths_P: valid inputs along time, the rest counts as zero. valid_P: False for dummy items,
        which then enter no batch statistics.
        """
        grid, items = self.grid(x.shape[2:]), x.shape[0]
        x = zero_behind(x.to(next(self.parameters()).dtype), lengths_P)
        if x.ndim == 5:
            if valid_P is not None:
                valid_P = valid_P.repeat_interleave(x.shape[2])
            x = x.transpose(1, 2).flatten(0, 1)
        maps = self._features(x.contiguous(memory_format=torch.channels_last), valid_P)
        return maps.movedim(1, -1).reshape(items, prod(grid), self.width), grid

    def _features(self, x: Tensor, valid_P: Tensor | None) -> Tensor:
        norms = [m for m in self.features.modules() if isinstance(m, MapBatchNorm)]
        for norm in norms:
            norm.valid = valid_P
        maps: Tensor = self.features(x)
        for norm in norms:
            norm.valid = None
        return maps


class ConvAV8(ConvNet):
    """Eight 3x3 convolutions of L3-Net (stride 1) and AVE-Net (stride 2 in the first one).

    Widths 64, 64, 128, 128, 256, 256, 512, 512 with batch norm and ReLU, 2x2 max-pools after each
    pair but the last, whose map is returned: 14x14 for a 224x224 image at stride 2 (Arandjelovic
    and Zisserman 2017, 2018); those of another `width` in proportion. input_norm puts a batch norm
    on the input map (OpenL3).
    """

    def __init__(
        self, in_channels: int = 1, stride: int = 1, input_norm: bool = False, width: int = 64
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [MapBatchNorm(in_channels)] if input_norm else []
        last = in_channels
        for i in range(4):
            wide = width << i
            layers += [*_conv(last, wide, stride if i == 0 else 1), *_conv(wide, wide, 1)]
            layers += [nn.MaxPool2d(2)] if i < 3 else []
            last = wide
        self.features = nn.Sequential(*layers)
        self.stack = spatial_stack(self.features)
        self.width = last


class EfficientNetB0(ConvNet):
    """torchvision's EfficientNet-B0 without its classifier: 1280 channels at stride 32 (COLA).

    The weights are random. drop_path is the probability of skipping a block at the last layer.
    """

    def __init__(self, in_channels: int = 1, drop_path: float = 0.2) -> None:
        super().__init__()
        net = torchvision.models.efficientnet_b0(
            weights=None, norm_layer=MapBatchNorm, stochastic_depth_prob=drop_path
        )
        first = net.features[0][0]
        net.features[0][0] = he_normal(
            nn.Conv2d(in_channels, first.out_channels, 3, 2, 1, bias=False)
        )
        self.features = net.features
        self.width = 1280
        self.stack = spatial_stack(self.features)


def _conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    conv = he_normal(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
    return [conv, MapBatchNorm(outputs), nn.ReLU(inplace=True)]


def he_normal(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution with weights drawn as torchvision's ResNets draw them (He et al. 2015)."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def spatial_stack(features: nn.Module) -> Stack:
    """Kernels, strides and paddings of a network's square convolutions and poolings above 1x1."""
    found = [
        [int(n if isinstance(n, int) else n[0]) for n in (m.kernel_size, m.stride, m.padding)]
        for m in features.modules()
        if isinstance(m, nn.Conv2d | nn.MaxPool2d)
    ]
    kernels, strides, paddings = zip(*(f for f in found if f[0] > 1), strict=True)
    return list(kernels), list(strides), list(paddings)
