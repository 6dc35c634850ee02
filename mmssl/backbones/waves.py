"""Convolutional encoders of raw waveforms. P items, S samples, C channels, T steps, D width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.backbones.convnets import ConvNet, MapBatchNorm, Masked
from mmssl.dist import MaskedSyncBatchNorm
from mmssl.frontends.lengths import Field, stack_field, stack_length
from mmssl.frontends.patches import dtype_of, stack_lengths, zero_behind
from mmssl.frontends.sinc import SincConv
from mmssl.types import UserError


class TimeNorm(nn.Module):
    """Zero mean and unit variance over time in each channel; gain and bias per channel and step."""

    no_decay = True

    def __init__(self, channels: int, steps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, steps))
        self.bias = nn.Parameter(torch.zeros(channels, steps))

    def forward(self, x_PCT: Tensor) -> Tensor:
        """(P, C, T), same shape out."""
        return F.layer_norm(x_PCT, x_PCT.shape[-1:], eps=1e-6) * self.weight + self.bias


class SincNet(nn.Module):
    """SincNet (Ravanelli and Bengio 2018) and linear layers on chunks of a waveform (LIM, 2019).

    Sinc filters and their absolute value, two convolutions of 60 channels and 5 taps, each
    followed by a max-pool of 3, a norm over time and leaky ReLU; then linear layers with batch norm
    and leaky ReLU. A token is one chunk of `samples`, every `shift` samples.

    widths: of the linear layers; the last is the width of a token.
    """

    def __init__(
        self,
        in_channels: int = 1,
        sample_rate: int = 16000,
        samples: int = 3200,
        shift: int = 160,
        filters: int = 80,
        kernel: int = 251,
        widths: Sequence[int] = (2048, 2048),
    ) -> None:
        super().__init__()
        self.samples, self.shift, self.width = samples, shift, widths[-1]
        self.stack = ([samples], [shift], [0])
        self.input_norm = TimeNorm(1, samples)
        self.sinc = SincConv(filters, kernel, sample_rate)
        channels, steps = [filters, 60, 60], (samples - kernel + 1) // 3
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList([TimeNorm(filters, steps)])
        for before, after in pairwise(channels):
            self.convs.append(nn.Conv1d(before, after, 5))
            steps = (steps - 4) // 3
            self.norms.append(TimeNorm(after, steps))
        self.flat_norm = nn.LayerNorm(channels[-1] * steps, eps=1e-6)
        sizes = [channels[-1] * steps, *widths]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.batch_norms = nn.ModuleList(MaskedSyncBatchNorm(b) for b in widths)

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along time."""
        return (stack_field(*self.stack),)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Grid (T,) of a waveform (S,).

        Raises:
            UserError: it is shorter than a chunk.
        """
        if len(shape) != 1 or shape[0] < self.samples:
            raise UserError(
                f"sincnet reads a waveform of at least {self.samples} samples, got {tuple(shape)}; "
                "set frontend.kind: waveform and a longer crop_s, or smaller backbone.samples"
            )
        return (stack_length(shape[0], *self.stack),)

    def out_lengths(self, lengths_P: Tensor, rank: int = 1) -> Tensor:
        """Valid chunks, at least 1 where there is anything."""
        return stack_lengths(lengths_P, *self.stack)

    def forward(
        self, x_P1S: Tensor, lengths_P: Tensor | None = None, valid_P: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """(P, 1, S) to tokens (P, T, D) and their grid, as `ConvNet`."""
        grid = self.grid(x_P1S.shape[2:])
        x = zero_behind(x_P1S, lengths_P)[:, 0].unfold(1, self.samples, self.shift)
        there = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if lengths_P is not None:
            steps = torch.arange(grid[0], device=x.device)
            there = steps < self.out_lengths(lengths_P)[:, None]
        if valid_P is not None:
            there = there & valid_P[:, None]
        x = self._convolved(x.flatten(0, 1)[:, None])
        for linear, norm in zip(self.linears, self.batch_norms, strict=True):
            x = F.leaky_relu(norm(linear(x), there.flatten()), 0.2)
        return x.view(*there.shape, self.width), grid

    def _convolved(self, chunks: Tensor) -> Tensor:
        """(N, 1, samples) to flat, normalised vectors."""
        x = self.sinc(self.input_norm(chunks)).abs()
        for i, norm in enumerate(self.norms):
            x = x if i == 0 else self.convs[i - 1](x)
            x = F.leaky_relu(norm(F.max_pool1d(x, 3)), 0.2)
        flat: Tensor = self.flat_norm(x.flatten(1))
        return flat


class WaveBlock(nn.Module):
    """Two convolutions of 9 taps with batch norm around a skip (CLAR's residual block)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, 9, stride), MapBatchNorm(outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs, 9, 1), MapBatchNorm(outputs)
        self.skip = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(_conv(inputs, outputs, 1, stride), MapBatchNorm(outputs))

    def forward(self, x_PCT: Tensor) -> Tensor:
        """(P, C, T) to (P, C', T / stride)."""
        y = F.relu(self.norm1(self.conv1(x_PCT)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x_PCT))


class WaveResNet18(ConvNet):
    """ResNet-18 in one dimension on the waveform (CLAR, Al-Tahan and Mohsenzadeh 2021).

    Stem of 7 taps and stride 2, max-pool of 9 with stride 2, blocks of 9 taps; a token is 32
    samples. channels: of the first stage, doubled in each of the other three. Items that end early
    are silent behind their end, and their batch norms count that silence.
    """

    def __init__(self, in_channels: int = 1, channels: int = 64) -> None:
        super().__init__()
        stem = [_conv(in_channels, channels, 7, 2), MapBatchNorm(channels), nn.ReLU()]
        layers: list[nn.Module] = [*stem, nn.MaxPool1d(9, 2, 4)]
        strides, before = [2, 2], channels
        for stage in range(4):
            wide, stride = channels << stage, 1 if stage == 0 else 2
            layers += [WaveBlock(before, wide, stride), WaveBlock(wide, wide, 1)]
            strides += [stride, 1, 1, 1]
            before = wide
        kernels = [7, *[9] * (len(strides) - 1)]
        self.features, self.width = nn.Sequential(*layers), before
        self.stack = (kernels, strides, [k // 2 for k in kernels])

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along time."""
        return (stack_field(*self.stack),)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Grid (T,) of a waveform (S,).

        Raises:
            UserError: no waveform.
        """
        if len(shape) != 1:
            raise UserError(
                f"wave_resnet18 reads a waveform, got {tuple(shape)}; set frontend.kind: waveform"
            )
        return (stack_length(shape[0], *self.stack),)

    def out_lengths(self, lengths_P: Tensor, rank: int = 1) -> Tensor:
        """Valid steps, at least 1 where there is anything."""
        return stack_lengths(lengths_P, *self.stack)

    def forward(
        self, x_PCS: Tensor, lengths_P: Tensor | None = None, valid_P: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """(P, 1, S) to tokens (P, T, D) and their grid, as `ConvNet`."""
        x = zero_behind(x_PCS.to(dtype_of(self)), lengths_P)
        masked = [m for m in self.features.modules() if isinstance(m, Masked)]
        for part in masked:
            part.valid = valid_P
        maps: Tensor = self.features(x)
        for part in masked:
            part.valid = None
        return maps.transpose(1, 2), self.grid(x_PCS.shape[2:])


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv1d:
    conv = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
