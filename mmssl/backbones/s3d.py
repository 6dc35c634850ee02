"""S3D-G: torchvision's separable 3D Inception with self-gating (Xie et al. 2018).

P items, C channels, T frames, h w places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.video.s3d import SepInceptionBlock3D, TemporalSeparableConv
from torchvision.ops.misc import Conv3dNormActivation

from mmssl.backbones.convnets import (
    ConvNet,
    Grid,
    HalvingPool,
    MapBatchNorm,
    Masked,
    Valid,
    halved_masks,
    he_normal,
)
from mmssl.frontends.lengths import Field, stack_field
from mmssl.types import UserError

# outputs of the branches 0, 1, 1, 2, 2, 3 of the Inception blocks 3b to 5c
BLOCKS = (
    *((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    *((192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64)),
    *((112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128)),
    *((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
# of the widest path behind the second pooling, along every axis
_KERNELS = (3, 3, 3, *[3] * 5, 2, 3, 3)
_STRIDES = (1, 1, 2, *[1] * 5, 2, 1, 1)


class SelfGate(Masked, nn.Module):
    """x * sigmoid(W mean(x) + b), the mean over all places and steps of an item (Xie, eq. 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x_PCThw: Tensor) -> Tensor:
        """Same shape; padding must be zero and counts for nothing."""
        valid = self.mask(x_PCThw)
        mean_PC = x_PCThw.mean((2, 3, 4))
        if valid is not None:
            steps_P1 = valid.sum((1, 2, 3, 4)).clamp(min=1)[:, None].to(mean_PC.dtype)
            mean_PC = mean_PC * x_PCThw.shape[2] / steps_P1
        gate_PC: Tensor = self.linear(mean_PC).sigmoid()
        return x_PCThw * gate_PC[:, :, None, None, None]


class TimeConv(nn.Conv3d):
    """A convolution over frames that may be `deflated`: its kernel summed over time, per frame."""

    deflated = False

    def forward(self, input: Tensor) -> Tensor:
        """(P, C, T, h, w); deflated, T must be 1."""
        if not self.deflated:
            return super().forward(input)
        kernel = self.weight.sum(2, keepdim=True)
        stride, padding = (1, *self.stride[1:]), (0, *self.padding[1:])
        return F.conv3d(input, kernel, None, stride, padding)


class S3DG(ConvNet):
    """Gated separable 3D Inception, 1024 channels at stride 8 in time and 32 in space.

    in_channels: colours. channels: of the first layer, 64 as published; the others in proportion.
    first_frames: kernel of the first layer along time, 7 (MMV) or 3 (MIL-NCE's release); it is a
    full 3D convolution in both, where torchvision's is separable. gating: off is S3D. deflated: the
    network of single images, of the same weights.

    Sizes are halved and rounded up, as TensorFlow's do. Padding is symmetric, as torchvision's.
    """

    frame_wise = False

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 64,
        first_frames: int = 7,
        gating: bool = True,
        deflated: bool = False,
    ) -> None:
        super().__init__()
        if channels % 8:
            raise UserError(f"s3dg.channels: {channels} is no multiple of 8, so that widths break")
        kernel, padding = (first_frames, 7, 7), (first_frames // 2, 3, 3)
        first = Conv3dNormActivation(
            in_channels, channels, kernel, 2, padding, norm_layer=MapBatchNorm
        )
        point = Conv3dNormActivation(channels, channels, 1, norm_layer=MapBatchNorm)
        last = 3 * channels
        second = _gated(TemporalSeparableConv(channels, last, 3, 1, 1, MapBatchNorm), last, gating)
        layers = [first, _pool_space(), point, second, _pool_space()]
        pools = {2: HalvingPool(3), 7: nn.MaxPool3d(2, 2, ceil_mode=True)}
        for i, full in enumerate(BLOCKS):
            sizes = [size * channels // 64 for size in full]
            layers += [pools[i]] if i in pools else []
            layers.append(_inception(last, sizes, gating))
            last = sizes[0] + sizes[2] + sizes[4] + sizes[5]
        self.features, self.width = nn.Sequential(*layers), last
        _over_time(self.features)
        kernels, strides = (7, 3, 3, 3, *_KERNELS), (2, 2, 1, 2, *_STRIDES)
        self.stack = (list(kernels), list(strides), [(k - 1) // 2 for k in kernels])
        self.first_frames = first_frames
        if deflated:
            self.deflate()

    def deflate(self) -> None:
        """Become the network of single images: kernels are summed over time (MMV, section 3.3)."""
        self.frame_wise = True
        for part in self.features.modules():
            if isinstance(part, TimeConv):
                part.deflated = True

    def time_field(self) -> Field:
        """How tokens see the frames of a video."""
        if self.frame_wise:
            return super().time_field()
        kernels = (self.first_frames, 3, *_KERNELS)
        return stack_field(kernels, (2, 1, *_STRIDES), [(k - 1) // 2 for k in kernels])

    def grid(self, shape: Sequence[int]) -> Grid:
        """Token grid of frames (T, H, W): every halving rounds up."""
        frames, *sides = shape
        steps = frames if self.frame_wise else -(-frames // 8)
        return (steps, *(-(-side // 32) for side in sides))

    def out_lengths(self, lengths_P: Tensor, rank: int = 3) -> Tensor:
        """Valid steps of so many valid frames."""
        return lengths_P if self.frame_wise else (lengths_P + 7) // 8

    def _valid(self, x: Tensor, lengths_P: Tensor | None, valid_P: Tensor | None) -> Valid | None:
        return halved_masks(x, lengths_P, valid_P)

    def _features(self, x: Tensor, valid: Valid | None, frames: int) -> Tensor:
        if not self.frame_wise:
            return super()._features(x, valid, frames)
        return super()._features(x[:, :, None], valid, frames)[:, :, 0]


def _pool_space() -> nn.Module:
    return nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))


def _gated(layer: nn.Module, channels: int, gating: bool) -> nn.Module:
    return nn.Sequential(layer, SelfGate(channels)) if gating else layer


def _inception(inputs: int, sizes: Sequence[int], gating: bool) -> nn.Module:
    block: nn.Module = SepInceptionBlock3D(inputs, *sizes, MapBatchNorm)
    for i, outputs in enumerate((sizes[0], sizes[2], sizes[4], sizes[5])):
        branch = getattr(block, f"branch{i}")
        setattr(block, f"branch{i}", _gated(branch, outputs, gating))
    return block


def _over_time(network: nn.Module) -> None:
    """Let every convolution over several frames be one that can be deflated; draw all weights."""
    for parent in list(network.modules()):
        for name, conv in list(parent.named_children()):
            if type(conv) is nn.Conv3d and conv.kernel_size[0] > 1:
                shape = (conv.in_channels, conv.out_channels, conv.kernel_size)
                conv = TimeConv(*shape, conv.stride, conv.padding, bias=False)  # type: ignore[arg-type]
                setattr(parent, name, conv)
            if isinstance(conv, nn.Conv3d):
                he_normal(conv)
