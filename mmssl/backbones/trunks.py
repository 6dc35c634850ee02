"""torchvision's image networks and speech networks without their poolings and classifiers.

P items, C channels, N tokens, T frames, F bands. Weights are random. Images and spectrograms alike:
`ResNet18`, `VGG16` and `AlexNet` read any number of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.backbones.convnets import ConvNet, MapBatchNorm, he_normal, spatial_stack
from mmssl.dist import MaskedSyncBatchNorm
from mmssl.frontends.lengths import Field, stack_field, stack_length
from mmssl.frontends.patches import dtype_of, stack_lengths, zero_behind
from mmssl.types import UserError


class ResNet18(ConvNet):
    """ResNet-18 up to its last block: 7x7x512 for a 224x224 image (LVS, EZ-VSL).

    stride: pixels per cell; below 32 the last stages do not stride.
    """

    def __init__(self, in_channels: int = 3, stride: int = 32) -> None:
        super().__init__()
        net = torchvision.models.resnet18(weights=None, norm_layer=MapBatchNorm)
        first = he_normal(nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False))
        stages = [net.layer1, net.layer2, net.layer3, net.layer4]
        for stage in stages[{32: 4, 16: 3, 8: 2}[stride] :]:
            for layer in stage[0].modules():
                if isinstance(layer, nn.Conv2d):
                    layer.stride = (1, 1)
        self.features = nn.Sequential(first, net.bn1, net.relu, net.maxpool, *stages)
        self.stack = spatial_stack(self.features)
        self.width = net.fc.in_features


class ResNet50(ConvNet):
    """ResNet-50 up to its last block: 7x7x2048 for a 224x224 image (BYOL, MoCo, SimSiam).

    Strides are in the 3x3 convolutions. zero_init: residual branches start at 0.
    """

    def __init__(self, in_channels: int = 3, zero_init: bool = False) -> None:
        super().__init__()
        net = torchvision.models.resnet50(
            weights=None, norm_layer=MapBatchNorm, zero_init_residual=zero_init
        )
        first = he_normal(nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False))
        stages = [net.layer1, net.layer2, net.layer3, net.layer4]
        self.features = nn.Sequential(first, net.bn1, net.relu, net.maxpool, *stages)
        self.stack = spatial_stack(self.features)
        self.width = net.fc.in_features


class VGG16(ConvNet):
    """VGG-16 up to its last convolution: 14x14x512 for a 224x224 image.

    outputs: channels of one more 3x3 convolution behind it (matchmaps: 1024), 0 = none.
    """

    def __init__(self, in_channels: int = 3, outputs: int = 0) -> None:
        super().__init__()
        layers = list(torchvision.models.vgg16(weights=None).features[:-1])
        layers[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
        nn.init.kaiming_normal_(layers[0].weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(layers[0].bias)
        self.width = outputs or 512
        if outputs:
            layers.append(nn.Conv2d(512, outputs, 3, padding=1))
        self.features = nn.Sequential(*layers)
        self.stack = spatial_stack(self.features)


class AlexNet(ConvNet):
    """AlexNet with batch norm up to its last convolution: 13x13 for a 224x224 image.

    channels: of its five convolutions: 64, 192, 384, 256, 256 in RotNet (Krizhevsky 2014), 96, 256,
    384, 384, 256 in DeepCluster.
    """

    def __init__(
        self, in_channels: int = 3, channels: Sequence[int] = (64, 192, 384, 256, 256)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        shapes = [(11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1)]
        widths = pairwise([in_channels, *channels])
        for i, ((before, after), shape) in enumerate(zip(widths, shapes, strict=True)):
            layers += [nn.MaxPool2d(3, 2)] if i in (1, 2) else []
            layers += [he_normal(nn.Conv2d(before, after, *shape, bias=False))]
            layers += [MapBatchNorm(after), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.stack = spatial_stack(self.features)
        self.width = channels[-1]


class SpeechConv(ConvNet):
    """Convolutions along time over all bands of a spectrogram (DAVEnet 2016, matchmaps 2018).

    Each is followed by ReLU and, where `pools` is not 0, a max-pool of that width and stride 2.
    What lies behind an item's length is zero before every layer: padding changes no valid step.
    Their grid is (T', 1).

    norm: batch norm of the spectrogram, one mean and deviation for all bands.
    """

    def __init__(
        self,
        in_channels: int = 1,
        bands: int = 40,
        channels: Sequence[int] = (128, 256, 512, 512, 1024),
        kernels: Sequence[int] = (1, 11, 17, 17, 17),
        pools: Sequence[Literal[0, 3, 4]] = (0, 3, 3, 3, 3),
        norm: bool = True,
    ) -> None:
        super().__init__()
        widths = [in_channels * bands, *channels]
        self.bands, self.pools, self.width = bands, tuple(pools), widths[-1]
        self.norm = MaskedSyncBatchNorm(1) if norm else None
        self.convs = nn.ModuleList(
            nn.Conv1d(widths[i], widths[i + 1], kernel, padding=kernel // 2)
            for i, kernel in enumerate(kernels)
        )
        layers = [
            layer
            for kernel, pool in zip(kernels, pools, strict=True)
            for layer in ((kernel, 1, kernel // 2), *([(pool, 2, 1)] if pool else []))
        ]
        sizes, strides, paddings = (list(column) for column in zip(*layers, strict=True))
        self.stack = (sizes, strides, paddings)

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along time; all bands at once."""
        return stack_field(*self.stack), Field(self.bands, self.bands, (self.bands - 1) / 2)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Grid (T', 1) of a spectrogram (T, F).

        Raises:
            UserError: another number of bands, or no step left.
        """
        out = stack_length(shape[0], *self.stack)
        if len(shape) != 2 or shape[1] != self.bands or out == 0:
            raise UserError(
                f"speech_conv reads a spectrogram of {self.bands} bands, got {tuple(shape)}; set "
                "backbone.bands to the front-end's n_mels and make the audio view long enough"
            )
        return out, 1

    def forward(
        self, x: Tensor, lengths_P: Tensor | None = None, valid_P: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """(P, 1, T, F) to tokens (P, T', D) and their grid, as `ConvNet`."""
        grid = self.grid(x.shape[2:])
        x = self._normed(x[:, 0].to(dtype_of(self.convs)), lengths_P, valid_P)
        x = x.transpose(1, 2)
        for conv, pool in zip(self.convs, self.pools, strict=True):
            x = zero_behind(F.relu(conv(zero_behind(x, lengths_P))), lengths_P)
            if pool:
                x = F.max_pool1d(x, pool, 2, 1)
                lengths_P = (
                    None if lengths_P is None else stack_lengths(lengths_P, [pool], [2], [1])
                )
        return x.transpose(1, 2), grid

    def _normed(self, x_PTF: Tensor, lengths_P: Tensor | None, valid_P: Tensor | None) -> Tensor:
        if self.norm is None:
            return x_PTF
        there = torch.ones(x_PTF.shape[:2], dtype=torch.bool, device=x_PTF.device)
        if lengths_P is not None:
            there = torch.arange(x_PTF.shape[1], device=x_PTF.device) < lengths_P[:, None]
        if valid_P is not None:
            there = there & valid_P[:, None]
        out: Tensor = self.norm(x_PTF[..., None], there[..., None].expand(x_PTF.shape))
        return out[..., 0]
