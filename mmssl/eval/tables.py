"""Scores of all videos with all sounds or texts, for methods whose only score is a map.

Such a score is no product of two vectors: every one of the N x N pairs is scored as in training,
and clips are ranked by that (Harwath et al. 2018; Arandjelovic and Zisserman 2018).

Cost: the features of all clips are held on the host, 4 N (T S + U) D bytes, and N^2 T S U D
products are summed in float64 (aligned scores and pooled queries: U = 1). At N = 1000 that is
1.3 GB and 2.6e13 for `matchmap`, 2.6 GB and 2.0e14 for `dense_av`, 0.1 GB and 2.5e10 for
`avol_net`. A pair takes a CPU core about 2, 100 and 0.03 ms. All of that doubles with the random
baseline, and time grows with the square of N: hence `map_clips` of `mmssl eval retrieval`.

Letters in shapes: B rows of a batch, P rows that have both sides, Q and C rows of one block, T time
bins, S cells of one, U steps of a query (a sound or a text), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mmssl.types import Batch, UserError

Pair = tuple[str, str]
Parts = tuple[Tensor, ...]
Ints = NDArray[np.int64]
Singles = NDArray[np.float32]

_SIMILARITIES = 2**24  # of cells with steps in one block: 128 MiB, and a few copies of it


@dataclass(frozen=True)
class Sides:
    """What a map score reads of the P rows that have both sides (`rows_P`: numbers in `Rows`).

    video: cells (P, T, S, D) and which of them are valid; query: steps (P, U, D), the same.
    """

    rows_P: Ints
    video: Parts
    query: Parts


@dataclass(frozen=True)
class Table:
    """Scores of video i (row) with query j of the rows `rows_P`."""

    rows_P: Ints
    scores_PP: Singles

    def take(self, kept: Ints) -> Table:
        """The table of some rows of the test set (ascending numbers), renumbered."""
        inside = np.flatnonzero(np.isin(self.rows_P, kept))
        rows_P = np.searchsorted(kept, self.rows_P[inside])
        return Table(rows_P, self.scores_PP[np.ix_(inside, inside)])


def ranked(meta: Mapping[str, Any]) -> bool:
    """The row takes part in retrieval: pictures of two objects hold two right answers."""
    return meta.get("kind") != "two"


def sides(batch: Batch, first: int, video: Parts, query: Parts, present_B: Tensor) -> Sides:
    """Sides of the rows of a batch that take part and have both.

    first: number of the batch's first row in the test set.
    """
    metas = batch.meta or [{}] * batch.size
    kept = [i for i, there in enumerate(present_B.tolist()) if there and ranked(metas[i])]
    return Sides(np.asarray(kept, dtype=np.int64) + first, _held(video, kept), _held(query, kept))


def _held(parts: Parts, kept: list[int]) -> Parts:
    values, valid = parts
    return values[kept].float().cpu(), valid[kept].cpu()


def table(
    parts: Sequence[Sides],
    score: Callable[[Parts, Parts], Tensor],
    device: torch.device,
    title: str = "pairs",
    block: int = 0,
) -> Table:
    """Score every video with every query, a block of each at a time, with a progress bar.

    Sums are made in float64 and rounded to float32, so that scores that are equal in exact
    arithmetic stay equal whatever the blocks.

    Args:
        parts: sides of the batches.
        score: (video, query) parts of Q and C rows -> (Q, C).
        device: where it is computed.
        title: of the progress bar.
        block: rows of each side; 0 = as many as a bounded number of similarities allows.

    Raises:
        UserError: clips differ in their grid of cells.
    """
    parts = [part for part in parts if len(part.rows_P)]
    if not parts:
        return Table(np.zeros(0, np.int64), np.zeros((0, 0), np.float32))
    one_grid("retrieval", [tuple(part.video[1].shape[1:]) for part in parts])
    steps = max(part.query[1].shape[1] for part in parts)
    video = [torch.cat(column) for column in zip(*(part.video for part in parts), strict=True)]
    padded = (tuple(pad_steps(x, steps) for x in part.query) for part in parts)
    query = [torch.cat(column) for column in zip(*padded, strict=True)]
    count = len(video[0])
    block = block or max(1, isqrt(_SIMILARITIES // max(1, video[1][0].numel() * steps)))
    starts, scores_PP = range(0, count, block), np.empty((count, count), np.float32)
    with torch.inference_mode(), tqdm(total=count**2, desc=title, disable=None) as bar:
        for i in starts:
            cells = _block(video, i, block, device)
            for j in starts:
                found = score(cells, _block(query, j, block, device)).cpu().numpy()
                scores_PP[i : i + block, j : j + block] = found
                bar.update(found.size)
    return Table(np.concatenate([part.rows_P for part in parts]), scores_PP)


def _block(parts: Sequence[Tensor], begin: int, size: int, device: torch.device) -> Parts:
    values, valid = (part[begin : begin + size].to(device) for part in parts)
    return values.double(), valid


def one_grid(suite: str, grids: Sequence[tuple[int, ...]]) -> None:
    """Refuse features of clips of different grids.

    Raises:
        UserError: there are several.
    """
    if len(set(grids)) > 1:
        raise UserError(
            f"{suite}: clips have different grids {sorted(set(grids))}; "
            "give the video view a fixed crop_s and size"
        )


def pad_steps(x_PA: Tensor, steps: int) -> Tensor:
    """Zeros (False) behind the last step, up to `steps`."""
    padded = x_PA.new_zeros((x_PA.shape[0], steps, *x_PA.shape[2:]))
    padded[:, : x_PA.shape[1]] = x_PA
    return padded
