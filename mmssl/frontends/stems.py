"""Signals to token grids by strided, overlapping convolutions.

P items, C channels, N tokens, D width. A signal is (P, C, *axes): (P, 1, S) for a waveform, (P, 1,
T, F) for a spectrogram, (P, 3, T, H, W) for video. Tokens come in row-major order of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.frontends.lengths import Field, same_padding, stack_field, stack_length
from mmssl.frontends.patches import stack_lengths, zero_behind
from mmssl.types import UserError

Grid = tuple[int, ...]
NORMS = ("layer", "group", "none")
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU} | {
    "none": nn.Identity
}


class ChannelNorm(nn.Module):
    """Normalisation of a channels-first map (P, C, *axes), one gain and bias per channel.

    `layer` normalises the channels of each place by itself, so that neither padding nor a hidden
    cell changes the rest; `group` uses one mean and variance per item over all places; `none`
    passes through.
    """

    def __init__(self, channels: int, kind: str = "layer", eps: float = 1e-6) -> None:
        super().__init__()
        if kind not in NORMS:
            raise UserError(f"norm: {kind!r} is not known; use one of {', '.join(NORMS)}")
        self.kind = kind
        self.norm: nn.Module = nn.Identity()
        if kind == "layer":
            self.norm = nn.LayerNorm(channels, eps=eps)
        elif kind == "group":
            self.norm = nn.GroupNorm(1, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(P, C, *axes), same shape out."""
        if self.kind != "layer":
            out: Tensor = self.norm(x)
            return out
        # a channels-last map makes both moves free
        return torch.movedim(self.norm(torch.movedim(x, 1, -1)), -1, 1)


def _per_axis(values: Sequence[int | Sequence[int]], rank: int) -> list[tuple[int, ...]]:
    return [(v,) * rank if isinstance(v, int) else tuple(v) for v in values]


class ConvStack(nn.Module):
    """Strided, overlapping convolutions: conv, norm, activation per layer.

    channels: outputs of each layer; strides and kernels: one number or one per axis for each layer.
    A kernel left out is twice the stride (3 at stride 1): then every output sits at the middle of
    its cell. Works on waveforms and token rows (rank 1) and on spectrograms or images (rank 2).
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        kernels: Sequence[int | Sequence[int]] | None = None,
        rank: int = 2,
        norm: str = "layer",
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.rank = rank
        self.steps = _per_axis(strides, rank)
        default = [tuple(3 if s == 1 else 2 * s for s in step) for step in self.steps]
        self.kernels = default if kernels is None else _per_axis(kernels, rank)
        if not len(channels) == len(self.steps) == len(self.kernels):
            raise UserError(
                f"stem: {len(channels)} channels, {len(self.steps)} strides, {len(self.kernels)} "
                "kernels; give one of each per layer"
            )
        if activation not in ACTIVATIONS:
            raise UserError(
                f"activation: {activation!r} is not known; use one of {', '.join(ACTIVATIONS)}"
            )
        self.pads = [
            tuple(same_padding(k, s) for k, s in zip(kernel, step, strict=True))
            for kernel, step in zip(self.kernels, self.steps, strict=True)
        ]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.activation = ACTIVATIONS[activation]()
        make = nn.Conv1d if rank == 1 else nn.Conv2d
        widths = [in_channels, *channels]
        for i, (kernel, step, pad) in enumerate(
            zip(self.kernels, self.steps, self.pads, strict=True)
        ):
            conv = make(widths[i], widths[i + 1], kernel, step, pad)  # type: ignore[arg-type]
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.convs.append(conv)
            self.norms.append(ChannelNorm(widths[i + 1], norm))

    def along(self, axis: int) -> tuple[list[int], list[int], list[int]]:
        """Kernels, strides and paddings of all layers along one axis."""
        return (
            [kernel[axis] for kernel in self.kernels],
            [step[axis] for step in self.steps],
            [pad[axis] for pad in self.pads],
        )

    def grid(self, shape: Sequence[int]) -> Grid:
        """Output axes of an input with axes `shape`.

        Raises:
            UserError: the input is too short for the stack.
        """
        if len(shape) != self.rank:
            raise UserError(f"stem: an input of {tuple(shape)} does not have {self.rank} axes")
        out = tuple(stack_length(n, *self.along(axis)) for axis, n in enumerate(shape))
        if prod(out) == 0:
            raise UserError(
                f"stem: an input of {tuple(shape)} gives the grid {out}; use a longer or larger "
                "view, or smaller strides"
            )
        return out

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along each axis."""
        return tuple(stack_field(*self.along(axis)) for axis in range(self.rank))

    def forward(self, x: Tensor, lengths_P: Tensor | None = None) -> Tensor:
        """(P, C, *axes) to (P, C', *grid).

        lengths_P: valid inputs along the first axis; what lies behind is zeroed before every layer,
        which is what a row of exactly that length would see.
        """
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = self.activation(norm(conv(zero_behind(x, lengths_P))))
            if lengths_P is not None:
                one = (v[i][:1] for v in (self.kernels, self.steps, self.pads))
                lengths_P = stack_lengths(lengths_P, *one)
        return x

    def out_lengths(self, lengths_P: Tensor) -> Tensor:
        """Valid outputs along the first axis, at least 1 where the input has any."""
        return stack_lengths(lengths_P, *self.along(0))


class ConvStem(nn.Module):
    """Convolutional stem of a spectrogram (rank 2) or a waveform (rank 1).

    A ConvStack and a linear map of its channels to the width.

    Overlapping: hide input cells before the stem, never its tokens, when a task must not see them.
    """

    def __init__(
        self,
        width: int,
        channels: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        kernels: Sequence[int | Sequence[int]] | None = None,
        in_channels: int = 1,
        rank: int = 2,
        norm: str = "layer",
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.stack = ConvStack(in_channels, channels, strides, kernels, rank, norm, activation)
        self.proj = nn.Linear(channels[-1], width)

    @property
    def strides(self) -> Grid:
        """Inputs per token along each axis."""
        return tuple(field.stride for field in self.fields())

    def grid(self, shape: Sequence[int]) -> Grid:
        """Token grid of an input whose axes (without P and C) are `shape`."""
        return self.stack.grid(shape)

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along each axis."""
        return self.stack.fields()

    def out_lengths(self, lengths_P: Tensor) -> Tensor:
        """Valid tokens along the first axis, at least 1 where the input has any."""
        return self.stack.out_lengths(lengths_P)

    def forward(self, x: Tensor, lengths_P: Tensor | None = None) -> tuple[Tensor, Grid]:
        """(P, C, *axes) to tokens (P, N, D) and their grid.

        lengths_P: valid inputs along the first axis.

        Raises:
            UserError: the input is too short.
        """
        grid = self.grid(x.shape[2:])
        x = x.to(self.proj.weight.dtype)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        maps = torch.movedim(self.stack(x, lengths_P), 1, -1)
        tokens: Tensor = self.proj(maps.flatten(1, -2))
        return tokens, grid


class VideoConvStem(nn.Module):
    """Convolutional stem of video: one image stack on every frame, then a merge along time.

    fold: so many neighbouring frames enter the image stack together, as channels (a first layer
    with a temporal kernel and stride of that size); 2 halves the cost of the stack.

    Frames are folded into the batch and kept channels-last: on a CPU this halves the time of the
    stack, and the frames of a decoder already lie that way. The merge is a linear map of
    `temporal_kernel` neighbouring frames every `temporal_stride` frames (equal numbers: no overlap;
    larger kernel: zeros at the clip's ends).
    """

    def __init__(
        self,
        width: int,
        channels: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        kernels: Sequence[int | Sequence[int]] | None = None,
        temporal_kernel: int = 1,
        temporal_stride: int = 1,
        fold: int = 1,
        in_channels: int = 3,
        norm: str = "layer",
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if not 1 <= temporal_stride <= temporal_kernel:
            raise UserError(
                f"stem: temporal_stride {temporal_stride} must lie between 1 and "
                f"temporal_kernel {temporal_kernel}, or frames are skipped"
            )
        self.stack = ConvStack(in_channels * fold, channels, strides, kernels, 2, norm, activation)
        self.fold, self.kernel, self.step = fold, temporal_kernel, temporal_stride
        self.pad = same_padding(temporal_kernel, temporal_stride)
        self.time = ([fold, self.kernel], [fold, self.step], [0, self.pad])
        self.proj = nn.Linear(channels[-1] * temporal_kernel, width)

    @property
    def strides(self) -> Grid:
        """Inputs per token along time, height and width."""
        return tuple(field.stride for field in self.fields())

    def grid(self, shape: Sequence[int]) -> Grid:
        """Token grid (t, h, w) of frames (T, H, W).

        Raises:
            UserError: too few frames or too small frames.
        """
        steps = stack_length(shape[0], *self.time)
        if steps == 0:
            raise UserError(
                f"stem: {shape[0]} frames are fewer than one token needs; use a longer view, or a "
                f"smaller fold ({self.fold}) or temporal_kernel ({self.kernel})"
            )
        return (steps, *self.stack.grid(shape[1:]))

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along time, height and width."""
        return (stack_field(*self.time), *self.stack.fields())

    def out_lengths(self, lengths_P: Tensor) -> Tensor:
        """Valid tokens along time, at least 1 where the input has any."""
        return stack_lengths(lengths_P, *self.time)

    def forward(self, x_PCTHW: Tensor, lengths_P: Tensor | None = None) -> tuple[Tensor, Grid]:
        """(P, 3, T, H, W) to tokens (P, N, D) and their grid.

        lengths_P: valid frames.

        Raises:
            UserError: too few frames or too small frames.
        """
        grid = self.grid(x_PCTHW.shape[2:])
        items, frames = x_PCTHW.shape[0], x_PCTHW.shape[2] // self.fold
        x_PTCHW = x_PCTHW.transpose(1, 2)[:, : frames * self.fold]
        folded = x_PTCHW.reshape(items * frames, -1, *x_PTCHW.shape[3:]).to(self.proj.weight.dtype)
        maps = self.stack(folded.contiguous(memory_format=torch.channels_last))
        cells = torch.movedim(maps, 1, -1)
        cells = cells.view(items, frames, *cells.shape[1:])  # (P, T, h, w, C)
        if lengths_P is not None:
            lengths_P = stack_lengths(lengths_P, [self.fold], [self.fold], [0])
        cells = zero_behind(cells, lengths_P, axis=1)
        tokens: Tensor = self.proj(self._neighbours(cells))
        return tokens.flatten(1, 3), grid

    def _neighbours(self, cells: Tensor) -> Tensor:
        """(P, T, h, w, C) to (P, t, h, w, kernel * C): the frames of one token, earliest first."""
        if self.kernel == 1:
            return cells
        padded = F.pad(cells, (0, 0, 0, 0, 0, 0, self.pad, self.pad))
        return padded.unfold(1, self.kernel, self.step).transpose(-1, -2).flatten(-2)


class CellMerge(nn.Module):
    """Linear map of time x space x space neighbouring cells of a (t, h, w) grid to one token.

    Where the bins do not fill the last token, zeros do; bins behind an item's end count as zeros,
    too, so that a token does not depend on how far a batch is padded.
    """

    def __init__(self, width: int, time: int, space: int) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.proj = nn.Linear(width * time * space * space, width)

    def grid(self, shape: Sequence[int]) -> Grid:
        """Grid of the tokens.

        Raises:
            UserError: the cells of a frame do not fill whole tokens.
        """
        time, *space = shape
        if len(space) != 2 or any(n % self.space for n in space):
            raise UserError(
                f"cut.merge: frames of {' x '.join(map(str, space))} cells have no whole tokens of "
                f"{self.space} x {self.space}; change the view's size or `merge`"
            )
        return (-(-time // self.time), *(n // self.space for n in space))

    def out_lengths(self, bins_P: Tensor) -> Tensor:
        """Token steps of items with so many bins of cells; the last one may be partly filled."""
        return (bins_P + self.time - 1).div(self.time, rounding_mode="floor")

    def forward(
        self, x_PMD: Tensor, shape: Sequence[int], pad_PM: Tensor | None = None
    ) -> tuple[Tensor, Grid]:
        """Cells (P, M, D) of a grid, `pad_PM` behind the end, to tokens (P, N, D) and grid."""
        grid = self.grid(shape)
        (t, h, w), (a, f), width = grid, (self.time, self.space), x_PMD.shape[-1]
        if pad_PM is not None:
            x_PMD = x_PMD.masked_fill(pad_PM[..., None], 0.0)
        missing = (t * a - shape[0]) * shape[1] * shape[2]
        if missing:
            x_PMD = F.pad(x_PMD, (0, 0, 0, missing))
        blocks = x_PMD.reshape(-1, t, a, h, f, w, f, width).permute(0, 1, 3, 5, 2, 4, 6, 7)
        tokens: Tensor = self.proj(blocks.reshape(-1, t * h * w, a * f * f * width))
        return tokens, grid
