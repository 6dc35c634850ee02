"""What pretext tasks do to the signals that a tower reads.

Letters in shapes: P items, C channels, T frames, N tiles, A axes of a signal (P, C, *axes): time
and bands of a spectrogram, samples of a waveform, or time, height and width of a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor

from mmssl.rng import row_bits, row_uniform

TURNS = 4


def turned(x: Tensor, quarter: int) -> Tensor:
    """Pictures turned by so many quarters of a circle, counter-clockwise, bit for bit."""
    return torch.rot90(x, quarter, (-2, -1))


def mirrored(x_PCTF: Tensor, which: int, lengths_P: Tensor) -> Tensor:
    """Spectrograms as they are (0), backwards (1), upside down (2) or both (3).

    A quarter turn would swap time and frequency. lengths_P: valid frames; what lies behind stays.
    """
    if which & 1:
        place_T = torch.arange(x_PCTF.shape[2], device=x_PCTF.device)
        back_PT = lengths_P[:, None] - 1 - place_T
        index_PT = torch.where(back_PT >= 0, back_PT, place_T)
        x_PCTF = x_PCTF.gather(2, index_PT[:, None, :, None].expand_as(x_PCTF))
    return x_PCTF.flip(3) if which & 2 else x_PCTF


def tile_sizes(axes: Sequence[int], counts: Sequence[int], cover: float) -> tuple[int, ...]:
    """Cells of a tile along each axis: a share `cover` of what an even cut would give it.

    Axes that are cut into one, or behind the last of `counts`, are taken whole.
    """
    counts = [*counts, *[1] * (len(axes) - len(counts))]
    return tuple(
        size if count == 1 else int(cover * size / count)
        for size, count in zip(axes, counts, strict=True)
    )


def tiles(
    x: Tensor,
    lengths_P: Tensor,
    counts: Sequence[int],
    sizes: Sequence[int],
    seeds_P: Tensor,
    stream: str,
) -> Tensor:
    """(P, N, C, *sizes) tiles in row-major order, each at a random place of its own stretch.

    Stretches are equal parts of the item's valid frames, and of the other axes, so that tiles do
    not overlap; every tile has zero mean and unit variance, for levels would tell where it was.

    Args:
        x: (P, C, *axes) signal.
        lengths_P: valid frames, at least `counts[0] * sizes[0]`, else tiles overlap.
        counts: tiles along each axis, of the first ones at least.
        sizes: cells of a tile along each axis, as `tile_sizes`.
        seeds_P: int64; the places depend on nothing else.
        stream: name of the random stream.
    """
    counts = [*counts, *[1] * (len(sizes) - len(counts))]
    count = prod(counts)
    place_NA = torch.tensor(list(product(*map(range, counts))), device=x.device)
    u_PNA = row_uniform(seeds_P, count * len(sizes), stream).reshape(-1, count, len(sizes))
    items = torch.arange(len(x), device=x.device)
    index: list[Tensor] = [items.reshape(-1, *[1] * (1 + len(sizes)))]
    for axis, (parts, size) in enumerate(zip(counts, sizes, strict=True)):
        whole_P = lengths_P if axis == 0 else torch.full_like(lengths_P, x.shape[2 + axis])
        span_P1 = whole_P[:, None].double() / parts
        room_P1 = (span_P1 - size).clamp(min=0)
        start_PN = span_P1 * place_NA[:, axis] + room_P1 * u_PNA[..., axis]
        start_PN = start_PN.long().minimum((whole_P - size).clamp(min=0)[:, None])
        cells = torch.arange(size, device=x.device)
        shape = [1] * len(sizes)
        shape[axis] = size
        place = start_PN.reshape(*start_PN.shape, *[1] * len(sizes)) + cells.reshape(shape)
        index.append(place.clamp(max=x.shape[2 + axis] - 1))
    found = x.movedim(1, -1)[tuple(index)].movedim(-1, 2)
    flat = found.flatten(2)
    flat = flat - flat.mean(-1, keepdim=True)
    flat = flat / (flat.square().mean(-1, keepdim=True).sqrt() + 1e-5)
    return flat.reshape(found.shape)


def slices(x: Tensor, start_PN: Tensor, frames: int) -> Tensor:
    """(P, N, C, frames, ...) stretches of (P, C, T, ...) signals, each from its own frame on.

    What would lie behind T is the last frame again.
    """
    place_PNT = start_PN[..., None] + torch.arange(frames, device=x.device)
    items_P11 = torch.arange(len(x), device=x.device)[:, None, None]
    found = x.movedim(1, -1)[items_P11, place_PNT.clamp(max=x.shape[2] - 1)]
    return found.movedim(-1, 2)


def permutations(seeds_P: Tensor, things: int, stream: str) -> Tensor:
    """(P, N) a uniform permutation of 0 ... N - 1 of each row."""
    return row_bits(seeds_P, things, stream).argsort(-1)
