"""Unpadded strided convolutions on raw waveforms: the stem of wav2vec 2.0 and its kin.

P items, S samples, C channels, T frames, N tokens (N = T), D width, K taps, O output channels.
wav2vec 2.0 (Baevski et al. 2020, section 2) has seven convolutions of 512 channels: one frame per
320 samples, which sees 400, so T = floor((S - 400) / 320) + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.frontends.lengths import Field, conv_length, stack_field, stack_length
from mmssl.frontends.norms import TimeGroupNorm
from mmssl.frontends.patches import dtype_of, padding_mask, stack_lengths
from mmssl.frontends.stems import ACTIVATIONS
from mmssl.types import UserError

Grid = tuple[int, ...]
NORMS = ("group", "layer", "group1", "none")
KERNELS = (10, 3, 3, 3, 3, 2, 2)
STRIDES = (5, 2, 2, 2, 2, 2, 2)


class LatentTokens(NamedTuple):
    """What a stem that shows its latents makes of a batch.

    tokens_PND: projected. features_PTC: normed outputs of the convolutions (inputs of a quantiser).
    raw_PTC: the outputs themselves (wav2vec 2.0 penalises their mean square). All are finite and
    meaningless behind an item's end.
    """

    tokens_PND: Tensor
    features_PTC: Tensor
    raw_PTC: Tensor
    grid: Grid


class WaveStem(nn.Module):
    """Convolutions, then a LayerNorm (`features`) and a linear map to the width.

    norm: `group` normalises every channel over time, after the first convolution only (BASE);
    `layer` the channels of every frame, after every convolution (LARGE); `group1` all channels and
    frames together, after every convolution (vq-wav2vec); `none`. bias: of the convolutions.
    log_compress: log(|z| + 1) at the end (vq-wav2vec). gradient_scale multiplies the gradient that
    enters the convolutions; their learning rate would do the same only without Adam. dropout: of
    the tokens. project: False leaves LayerNorm and map out: the tokens are the latents themselves
    (vq-wav2vec), and the width is the number of channels. synthesis: a transposed convolution back
    to the waveform, from all that one latent sees (Conv-TasNet).

    Overlapping: hide tokens of this stem (its methods mask features), or whole input cells.
    """

    def __init__(
        self,
        width: int,
        channels: int = 512,
        kernels: Sequence[int] = KERNELS,
        strides: Sequence[int] = STRIDES,
        norm: str = "group",
        bias: bool = False,
        activation: str = "gelu",
        log_compress: bool = False,
        gradient_scale: float = 1.0,
        dropout: float = 0.0,
        project: bool = True,
        synthesis: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _check(kernels, strides, norm, activation)
        if not project and width != channels:
            raise UserError(
                f"wave stem: {channels} channels without a projection for a backbone of width "
                f"{width}; make them equal, or set project: true"
            )
        self.kernels, self.steps, self.kind = list(kernels), list(strides), norm
        self.log_compress, self.gradient_scale = log_compress, gradient_scale
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, (kernel, step) in enumerate(zip(kernels, strides, strict=True)):
            make = RowConv if norm == "layer" else nn.Conv1d
            conv = make(1 if i == 0 else channels, channels, kernel, step, bias=bias)
            nn.init.kaiming_normal_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            self.convs.append(conv)
            self.norms.append(_norm(norm, channels, i, eps))
        self.activation = ACTIVATIONS[activation]()
        self.channels = channels
        self.features = nn.LayerNorm(channels, eps=eps) if project else nn.Identity()
        self.proj = nn.Linear(channels, width) if project else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.decoder: nn.ConvTranspose1d | None = None
        if synthesis:
            field = self.fields()[0]
            self.decoder = nn.ConvTranspose1d(channels, 1, field.size, field.stride, bias=False)

    @property
    def _stack(self) -> tuple[list[int], list[int], list[int]]:
        return self.kernels, self.steps, [0] * len(self.kernels)

    @property
    def strides(self) -> Grid:
        """Samples per token."""
        return (stack_field(*self._stack).stride,)

    def grid(self, shape: Sequence[int]) -> Grid:
        """Frames of a waveform of axes (S,).

        Raises:
            UserError: it is shorter than one frame's field.
        """
        if len(shape) != 1:
            raise UserError(f"wave stem: an input of {tuple(shape)} is no waveform (S,)")
        frames = stack_length(shape[0], *self._stack)
        if frames == 0:
            raise UserError(
                f"wave stem: {shape[0]} samples are fewer than the {self.fields()[0].size} that "
                "one frame sees; use a longer view"
            )
        return (frames,)

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along time."""
        return (stack_field(*self._stack),)

    def out_lengths(self, lengths_P: Tensor) -> Tensor:
        """Valid frames, at least 1 where the input has any."""
        return stack_lengths(lengths_P, *self._stack)

    def forward(self, x_P1S: Tensor, lengths_P: Tensor | None = None) -> tuple[Tensor, Grid]:
        """(P, 1, S) to tokens (P, N, D) and their grid; arguments and errors as `encode`."""
        out = self.encode(x_P1S, lengths_P)
        return out.tokens_PND, out.grid

    def project(self, features_PTC: Tensor) -> Tensor:
        """(P, T, C) features, perhaps masked, to (P, T, D) tokens."""
        out: Tensor = self.dropout(self.proj(features_PTC))
        return out

    def decode(self, latents_PTC: Tensor) -> Tensor:
        """(P, T, C) to waveforms (P, (T - 1) stride + field); for stems with `synthesis`."""
        assert self.decoder is not None  # `build` refuses other stems
        wave_P1S: Tensor = self.decoder(latents_PTC.transpose(1, 2))
        return wave_P1S[:, 0]

    def encode(self, x_P1S: Tensor, lengths_P: Tensor | None = None) -> LatentTokens:
        """Tokens, and the features they are made of.

        lengths_P: valid samples; what lies behind influences no valid frame, the statistics of
        group norms included (other libraries count padding there).

        Raises:
            UserError: the waveform is too short.
        """
        grid = self.grid(x_P1S.shape[2:])
        x_P1S = x_P1S.to(dtype_of(self.convs))
        if self.kind == "layer":
            raw = self._channels_last(x_P1S.transpose(1, 2))
        else:
            raw = self._channels_first(x_P1S, lengths_P).transpose(1, 2)
        if self.log_compress:
            raw = raw.abs().log1p()
        raw = scale_gradient(raw, self.gradient_scale)
        features = self.features(raw)
        return LatentTokens(self.project(features), features, raw, grid)

    def _channels_first(self, x_PCS: Tensor, lengths_P: Tensor | None) -> Tensor:
        """(P, 1, S) to (P, C, T); torch's convolutions, and its group norm, like this layout."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x_PCS, pad = conv(x_PCS), None
            if lengths_P is not None:
                lengths_P = stack_lengths(
                    lengths_P, self.kernels[i : i + 1], self.steps[i : i + 1], [0]
                )
                pad = padding_mask(lengths_P, (x_PCS.shape[2],))
            x_PCS = self.activation(norm(x_PCS, pad) if isinstance(norm, TimeGroupNorm) else x_PCS)
        return x_PCS

    def _channels_last(self, x_PSC: Tensor) -> Tensor:
        """(P, S, 1) to (P, T, C), where a norm over channels needs no copy.

        The two copies per layer that other layouts need cost about a fourth of the stack.
        """
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_PSC = self.activation(norm(conv(x_PSC)))
        return x_PSC


class RowConv(nn.Conv1d):
    """An unpadded strided convolution of channels-last rows, as matrix products.

    Taps are taken `stride` at a time: the rows of such a product do not overlap, so they are a view
    of the input, and the products add up. Weights are those of `torch.nn.Conv1d`.
    """

    def forward(self, x_PSC: Tensor) -> Tensor:
        """(P, S, C) to (P, T, O)."""
        (kernel,), (step,) = self.kernel_size, self.stride
        items, samples, channels = x_PSC.shape
        if channels == 1:
            return F.linear(x_PSC[..., 0].unfold(1, kernel, step), self.weight[:, 0], self.bias)
        frames = conv_length(samples, kernel, step)
        out: Tensor | None = None
        for first in range(0, kernel, step):
            taps_OCK = self.weight[..., first : first + step]
            matrix = taps_OCK.permute(2, 1, 0).flatten(0, 1).expand(items, -1, -1)
            rows = _rows(x_PSC, first, taps_OCK.shape[2], step, frames)
            out = rows @ matrix if out is None else torch.baddbmm(out, rows, matrix)
        assert out is not None  # a kernel has at least one tap
        return out if self.bias is None else out + self.bias


def _rows(x_PSC: Tensor, first: int, count: int, step: int, frames: int) -> Tensor:
    """(P, T, count * C): `count` samples from `first` on, every `step`; count <= step."""
    if count == step:
        return x_PSC[:, first : first + frames * step].reshape(x_PSC.shape[0], frames, -1)
    if count == 1:
        return x_PSC[:, first::step][:, :frames]
    return x_PSC[:, first:].unfold(1, count, step)[:, :frames].transpose(2, 3).flatten(2)


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """`x` itself; its gradient is multiplied by `scale` (0 = zeros, not None)."""
    if scale == 1.0:
        return x
    return cast("Tensor", _ScaleGradient.apply(x, scale))  # type: ignore[no-untyped-call]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def _norm(kind: str, channels: int, layer: int, eps: float) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(channels, eps=eps)
    if kind == "group1":
        return TimeGroupNorm(1, channels, eps)
    if kind == "group" and layer == 0:
        return TimeGroupNorm(channels, channels, eps)
    return nn.Identity()


def _check(kernels: Sequence[int], strides: Sequence[int], norm: str, activation: str) -> None:
    if len(kernels) != len(strides) or not kernels:
        raise UserError(
            f"wave stem: {len(kernels)} kernels, {len(strides)} strides; give one each per layer"
        )
    if norm not in NORMS:
        raise UserError(f"wave stem: norm {norm!r} is not known; use one of {', '.join(NORMS)}")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"activation: {activation!r} is not known; use one of {', '.join(ACTIVATIONS)}"
        )
