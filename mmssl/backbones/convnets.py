"""Convolutional encoders of published methods; each returns its feature map as a token grid.

P items, C channels, N tokens, D width. A map is (P, C, T, F) for a spectrogram or (P, 3, T, H, W)
for frames, which are folded into the batch: their grid is (T, h, w). Pooling is left to the tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from mmssl.dist import MaskedSyncBatchNorm, merged_moments, sum_over_ranks, world_size
from mmssl.frontends.lengths import Field, stack_field, stack_length
from mmssl.frontends.patches import dtype_of, stack_lengths, zero_behind
from mmssl.types import UserError

Grid = tuple[int, ...]
Conv = TypeVar("Conv", nn.Conv2d, nn.Conv3d)
Stack = tuple[list[int], list[int], list[int]]  # kernels, strides, paddings
# (P,): the items that exist; or, for maps with time as first axis, {steps T: (P, T)}
Valid = Tensor | dict[int, Tensor]


class Masked:
    """A part that must know what is padding: (P,) items, or steps along a map's first axis.

    `valid` is set by the encoder for one forward, because networks of other libraries pass no mask
    on; None where nothing is padded.
    """

    valid: Valid | None = None

    def mask(self, x: Tensor) -> Tensor | None:
        """`valid`, in the shape of a (P, C, *axes) map."""
        valid = self.valid
        if isinstance(valid, dict):
            valid = valid[x.shape[2]]
        return None if valid is None else _like_map(valid, x)


class MapBatchNorm(Masked, MaskedSyncBatchNorm):
    """`MaskedSyncBatchNorm` of a channels-first map (P, C, *axes), without its fp64 copies.

    Evaluation, and training on one rank without padding, use torch's fused kernel.
    """

    def forward(self, x_PChw: Tensor, valid_P: Tensor | None = None) -> Tensor:
        """Normalise every channel over the valid places on all ranks; the others become zero."""
        valid = self.mask(x_PChw) if valid_P is None else _like_map(valid_P, x_PChw)
        places = x_PChw.shape[0] * prod(x_PChw.shape[2:])
        if self.training and (valid is not None or world_size() > 1 or places == 1):
            return self._over_ranks(x_PChw, valid)
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
        return out if valid is None else out.masked_fill(~valid, 0.0)

    def _over_ranks(self, x: Tensor, valid: Tensor | None) -> Tensor:
        with torch.no_grad():
            mean_C, var_C, total = _map_moments(x, valid)
            self._track(mean_C, var_C, total)
        stats = (mean_C, var_C, total, self.eps)
        out: Tensor = _Normalise.apply(x, self.weight, self.bias, valid, *stats)  # type: ignore[no-untyped-call]
        return out


class _Normalise(torch.autograd.Function):
    """Batch norm by statistics of all ranks, whose own gradients are part of the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        valid: Tensor | None,
        mean_C: Tensor,
        var_C: Tensor,
        total: Tensor,
        eps: float,
    ) -> Tensor:
        narrow = torch.promote_types(x.dtype, torch.float32)
        stats = (mean_C.to(narrow), var_C.to(narrow), weight.to(narrow), bias.to(narrow))
        ctx.save_for_backward(x, weight, valid, mean_C, (var_C + eps).rsqrt(), total)
        out = F.batch_norm(x, *stats, False, 0.0, eps)
        return out if valid is None else out.masked_fill(~valid, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, valid, mean_C, inverse_C, total = ctx.saved_tensors
        if valid is not None:
            grad = grad.masked_fill(~valid, 0.0)
        dims = _all_but_channels(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        unit = (x - _per_channel(mean_C, x, wide)) * _per_channel(inverse_C, x, wide)
        if valid is not None:
            unit = unit.masked_fill(~valid, 0.0)
        grad_bias = grad.sum(dims, dtype=torch.float64)
        grad_weight = (grad * unit).sum(dims, dtype=torch.float64)
        shares = sum_over_ranks(torch.stack([grad_bias, grad_weight])) / total.clamp(min=1)
        out = grad - _per_channel(shares[0], x, wide)
        out = out - unit.mul_(_per_channel(shares[1], x, wide))
        out = out.mul_(_per_channel(inverse_C * weight, x, wide))
        if valid is not None:
            out = out.masked_fill_(~valid, 0.0)
        return (out.to(x.dtype), grad_weight.to(weight), grad_bias.to(weight), *[None] * 5)


def _map_moments(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 mean (C,), variance (C,) and count (1,) over the valid places on all ranks."""
    dims, places = _all_but_channels(x), x.numel() // x.shape[1]
    count = x.new_full((1,), places, dtype=torch.float64)
    if valid is not None:
        count = valid.sum().double()[None] * (places // valid.numel())
        x = x.masked_fill(~valid, 0.0)
    mean_C = x.sum(dims, dtype=torch.float64) / count.clamp(min=1)
    centred = x - _per_channel(mean_C, x, torch.promote_types(x.dtype, torch.float32))
    if valid is not None:
        centred = centred.masked_fill_(~valid, 0.0)
    return merged_moments(mean_C, centred.square_().sum(dims, dtype=torch.float64), count)


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _per_channel(values_C: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return values_C.to(dtype).reshape(-1, *[1] * (x.ndim - 2))


class HalvingPool(Masked, nn.Module):
    """3-wide max-pooling with stride 2 along all axes that never sees behind an item's end."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.pool = (nn.MaxPool2d, nn.MaxPool3d)[axes - 2](3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(P, C, *axes) to half of every axis, rounded up; zero behind an end."""
        before = self.mask(x)
        if before is None:
            pooled: Tensor = self.pool(x)
            return pooled
        pooled = self.pool(x.masked_fill(~before, torch.finfo(x.dtype).min))
        after = self.mask(pooled)
        assert after is not None
        return pooled.masked_fill(~after, 0.0)


class ConvNet(nn.Module):
    """Base of the encoders: token grids from feature maps, and their arithmetic.

    frame_wise: frames are read one by one, so that they are folded into the batch.
    """

    width: int
    stack: Stack
    features: nn.Module
    frame_wise = True

    @property
    def strides(self) -> Grid:
        """Inputs per token along both axes of a map."""
        return tuple(field.stride for field in self.fields())

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along both axes of a map."""
        return (stack_field(*self.stack),) * 2

    def time_field(self) -> Field:
        """How tokens see the frames of a video."""
        return Field(1, 1, 0.0)

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
        x = zero_behind(x.to(dtype_of(self)), lengths_P)
        frames = 1
        if x.ndim == 5 and self.frame_wise:
            frames = x.shape[2]
            steps = step_mask(x, lengths_P, valid_P)
            valid: Valid | None = None if steps is None else steps.flatten()
            x = x.transpose(1, 2).flatten(0, 1)
        else:
            valid = self._valid(x, lengths_P, valid_P)
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        maps = self._features(x.contiguous(memory_format=layout), valid, frames)
        return maps.movedim(1, -1).reshape(items, prod(grid), self.width), grid

    @contextmanager
    def recorded(self) -> Iterator[dict[int, tuple[Tensor, Stack]]]:
        """The last map (P, C, *axes) of every stride in the forward inside, by its stride.

        Beside each the stack that leads to it. Empty where `stack` does not follow from `features`.
        """
        found: dict[int, tuple[Tensor, Stack]] = {}
        parts = list(self.features.children())

        def keep(number: int, _part: nn.Module, _inputs: Any, x: Tensor) -> None:
            stack = spatial_stack(nn.ModuleList(parts[: number + 1]))
            found[prod(stack[1])] = x, stack

        known = self.stack == spatial_stack(self.features)
        chosen = parts if known else []
        hooks = [part.register_forward_hook(partial(keep, i)) for i, part in enumerate(chosen)]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def _valid(self, x: Tensor, lengths_P: Tensor | None, valid_P: Tensor | None) -> Valid | None:
        """What the parts are told about padding of a map that is not folded."""
        return valid_P

    def _features(self, x: Tensor, valid: Valid | None, frames: int) -> Tensor:
        masked = [m for m in self.features.modules() if isinstance(m, Masked)]
        for part in masked:
            part.valid = valid
        maps: Tensor = self.features(x)
        for part in masked:
            part.valid = None
        return maps


def step_mask(x: Tensor, lengths_P: Tensor | None, valid_P: Tensor | None) -> Tensor | None:
    """(P, T) bool: which steps of a (P, C, T, ...) map exist; None if all do."""
    if lengths_P is None:
        return None if valid_P is None else valid_P[:, None].expand(-1, x.shape[2])
    steps = torch.arange(x.shape[2], device=x.device) < lengths_P[:, None]
    return steps if valid_P is None else steps & valid_P[:, None]


def halved_masks(
    x: Tensor, lengths_P: Tensor | None, valid_P: Tensor | None
) -> dict[int, Tensor] | None:
    """`step_mask` of a map and of all maps that layers of stride 2 make of it, by their steps.

    A layer of stride 2 makes ceil(n / 2) of n steps, of an item's valid ones as of all.
    """
    mask = step_mask(x, lengths_P, valid_P)
    if mask is None:
        return None
    masks = {mask.shape[1]: mask}
    while mask.shape[1] > 1:
        mask = mask[:, ::2]  # step t of the half stands on step 2t
        masks[mask.shape[1]] = mask
    return masks


def _like_map(valid: Tensor, x: Tensor) -> Tensor:
    """(P,) or (P, T) as (P, 1, T, 1 ...), which broadcasts over a (P, C, *axes) map."""
    rest = (1,) * (x.ndim - 1 - valid.ndim)
    return valid.reshape(valid.shape[0], 1, *valid.shape[1:], *rest)


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


def he_normal(conv: Conv) -> Conv:
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
    kept = [f for f in found if f[0] > 1]
    return [f[0] for f in kept], [f[1] for f in kept], [f[2] for f in kept]
