"""Pre-activation residual networks on spectrograms and, with shifts in time, on videos.

P items, T frames, C channels, h w places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmssl.backbones.convnets import (
    ConvNet,
    HalvingPool,
    MapBatchNorm,
    Valid,
    halved_masks,
    he_normal,
)


class TemporalShift(nn.Module):
    """Moves channels between neighbouring frames (TSM, Lin et al. 2019).

    The first `share` of the channels comes from the frame before, the last from the frame behind,
    and zeros from beyond the clip's ends. Channels stay at their places; MMV's release exchanges
    the two groups, which permutes the weights of the convolution that follows.
    """

    frames = 1  # of every item, set by the encoder for one forward

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """(P * T, C, h, w), same shape."""
        x_PTChw = x.reshape(-1, self.frames, *x.shape[1:])
        moved = int(x.shape[1] * self.share)
        sizes = [moved, x.shape[1] - 2 * moved, moved]
        late, still, early = torch.split(x_PTChw, sizes, dim=2)
        none = torch.zeros_like(late[:, :1])
        late = torch.cat([none, late[:, :-1]], 1)
        early = torch.cat([early[:, 1:], none], 1)
        return torch.cat([late, still, early], 2).flatten(0, 1)


class PreBottleneck(nn.Module):
    """x + 1x1(3x3(1x1(x))), each behind batch norm and ReLU (He et al. 2016, Identity Mappings).

    project: the skip is a 1x1 convolution of the activated input. shift: of `TemporalShift` before
    the first convolution; 0 = none.
    """

    def __init__(
        self, inputs: int, inner: int, stride: int = 1, project: bool = False, shift: float = 0.0
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(MapBatchNorm(n) for n in (inputs, inner, inner))
        kinds = ((inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, 4 * inner, 1, 1))
        self.convs = nn.ModuleList(_conv(*kind) for kind in kinds)
        self.project = _conv(inputs, 4 * inner, 1, stride) if project else None
        self.shift = TemporalShift(shift) if shift else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(P, inputs, h, w) to (P, 4 * inner, h / stride, w / stride)."""
        skip = x
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            x = norm(x).relu_()
            if i == 0:
                skip = skip if self.project is None else self.project(x)
                x = self.shift(x)
            x = conv(x)
        return skip + x


class ResNetV2(ConvNet):
    """ResNet-50 with pre-activation: MMV's audio network and, with `shift`, TSM-ResNet50.

    channels: of the stem; an output has 32 times as many, 2048 (ResNet-50) or 4096 (twice as wide).
    blocks: of the four stages. shift: share of channels that move to the next frame, and as many
    to the one before; videos without are read frame by frame, which is TSM's image network.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: int = 64,
        blocks: Sequence[int] = (3, 4, 6, 3),
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(in_channels, channels, 7, 2), HalvingPool(2)]
        last, kernels, strides = channels, [7, 3], [2, 2]
        for stage, count in enumerate(blocks):
            for i in range(count):
                stride = 2 if stage and not i else 1
                inner = channels << stage
                layers.append(PreBottleneck(last, inner, stride, i == 0, shift))
                last = 4 * inner
                kernels, strides = [*kernels, 3], [*strides, stride]
        self.features = nn.Sequential(*layers, MapBatchNorm(last), nn.ReLU(inplace=True))
        self.stack = (kernels, strides, [kernel // 2 for kernel in kernels])
        self.width = last

    def deflate(self) -> None:
        """Become the network of single images: no shifts (MMV, section 3.3)."""
        for part in self.features.modules():
            if isinstance(part, PreBottleneck):
                part.shift = nn.Identity()

    def _valid(self, x: Tensor, lengths_P: Tensor | None, valid_P: Tensor | None) -> Valid | None:
        return halved_masks(x, lengths_P, valid_P)

    def _features(self, x: Tensor, valid: Valid | None, frames: int) -> Tensor:
        for part in self.features.modules():
            if isinstance(part, TemporalShift):
                part.frames = frames
        return super()._features(x, valid, frames)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return he_normal(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False))
