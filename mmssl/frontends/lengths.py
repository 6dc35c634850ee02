"""Pure arithmetic of lengths: frames of a spectrogram, tokens of patches and convolutions.

Nothing here touches a tensor, so a tower can state its grid and its rate before any forward. Along
one axis L counts inputs, k is a kernel, s a stride, p the zeros added on each side (all in inputs
of that layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from mmssl.types import UserError

FRAMINGS = ("center", "valid", "pad_end")


class Field(NamedTuple):
    """How one output of a stack sees its input: output i is centred on input `first + i * stride`.

    first may be fractional (an even kernel) or negative; size is the receptive field, in inputs.
    """

    stride: int
    size: int
    first: float


def spectrogram_frames(samples: int, win: int, hop: int, framing: str = "center") -> int:
    """Number of frames of a short-time transform.

    `center` reflects half a transform at both ends (torch), `valid` keeps whole windows only,
    `pad_end` adds zeros after the end so that every hop starts a frame (TensorFlow's pad_end).

    Raises:
        UserError: unknown framing.
    """
    if framing == "center":
        return 1 + samples // hop
    if framing == "valid":
        return max(0, 1 + (samples - win) // hop)
    if framing == "pad_end":
        return -(-samples // hop)
    raise UserError(f"framing: {framing!r} is not known; use one of {', '.join(FRAMINGS)}")


def first_frame(win: int, hop: int, framing: str = "center") -> float:
    """Centre of the first frame's window, in hops behind the first sample."""
    return 0.0 if framing == "center" else win / 2 / hop


def conv_length(length: int, kernel: int, stride: int = 1, padding: int = 0) -> int:
    """Outputs of a convolution or floor-mode pooling along one axis; 0 for a short input."""
    return max(0, (length + 2 * padding - kernel) // stride + 1)


def stack_length(
    length: int, kernels: Sequence[int], strides: Sequence[int], paddings: Sequence[int]
) -> int:
    """Outputs of a stack of convolutions along one axis."""
    for kernel, stride, padding in zip(kernels, strides, paddings, strict=True):
        length = conv_length(length, kernel, stride, padding)
    return length


def stack_field(kernels: Sequence[int], strides: Sequence[int], paddings: Sequence[int]) -> Field:
    """Stride, receptive field and first centre of a stack of convolutions along one axis.

    For s = 2, k = 4, p = 1 throughout, the first centre is (stride - 1) / 2: the middle of its own
    cell, which odd kernels miss by up to half a cell.
    """
    stride, size, first = 1, 1, 0.0
    for kernel, step, padding in zip(kernels, strides, paddings, strict=True):
        first += ((kernel - 1) / 2 - padding) * stride
        size += (kernel - 1) * stride
        stride *= step
    return Field(stride, size, first)


def same_padding(kernel: int, stride: int) -> int:
    """Zeros per side that make a convolution give L / stride outputs when the stride divides L.

    An even kernel at stride 1 cannot do that symmetrically and gives one more.
    """
    return max(0, (kernel - stride + 1) // 2)


def patch_grid(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Grid of non-overlapping patches with valid padding: the remainder at each far end is cut off.

    Raises:
        UserError: another number of axes, or an input smaller than one patch.
    """
    if len(shape) != len(patch):
        raise UserError(
            f"patch {tuple(patch)} has {len(patch)} axes, the input {tuple(shape)} has "
            f"{len(shape)}; give one patch length per axis"
        )
    grid = tuple(length // size for length, size in zip(shape, patch, strict=True))
    if prod(grid) == 0:
        raise UserError(
            f"input {tuple(shape)} is smaller than one patch {tuple(patch)}; "
            "use a longer view or a smaller patch"
        )
    return grid
