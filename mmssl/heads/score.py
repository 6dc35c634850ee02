"""Scores: how well two embedded things belong together.

Letters in shapes: Q queries, C candidates, P pairs, D width, T time bins of a video, S cells of one
bin, U audio steps, N cells of all bins that are compared with one audio step.

Every score has `forward(a_QD, b_CD) -> (Q, C)`, all against all, and `pairs(a_PD, b_PD) -> (P,)`,
row by row. Scores are computed in fp32 or wider, autocast or not; temperatures come after them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.heads.reducers import Space, Time, reducer
from mmssl.objectives.contrastive import in_row_chunks
from mmssl.objectives.precision import wide

Normalize = Literal["both", "steps", "none"]


class Dot(nn.Module):
    """Dot product, of unit vectors (cosine) unless `normalize` is off."""

    def __init__(self, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, a_QD: Tensor, b_CD: Tensor) -> Tensor:
        """(Q, D) and (C, D) -> (Q, C)."""
        with _full_precision(a_QD):
            return self._prepare(a_QD) @ self._prepare(b_CD).T

    def pairs(self, a_PD: Tensor, b_PD: Tensor) -> Tensor:
        """(P, D) twice -> (P,)."""
        with _full_precision(a_PD):
            return (self._prepare(a_PD) * self._prepare(b_PD)).sum(-1)

    def _prepare(self, x: Tensor) -> Tensor:
        return _unit(x) if self.normalize else wide(x)


class Bilinear(nn.Module):
    """g^T W g' with a learned matrix (COLA, Saeed et al. 2021), W ~ N(0, std^2)."""

    def __init__(self, dim: int, std: float = 0.05) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.normal_(self.weight, std=std)

    def forward(self, a_QD: Tensor, b_CD: Tensor) -> Tensor:
        """(Q, D) and (C, D) -> (Q, C)."""
        with _full_precision(a_QD):
            return wide(a_QD) @ wide(self.weight) @ wide(b_CD).T

    def pairs(self, a_PD: Tensor, b_PD: Tensor) -> Tensor:
        """(P, D) twice -> (P,)."""
        with _full_precision(a_PD):
            return ((wide(a_PD) @ wide(self.weight)) * wide(b_PD)).sum(-1)


class Distance(nn.Module):
    """Affine function of the Euclidean distance of unit vectors (AVE-Net, 2018).

    The two logits (mismatch, match) are weight * distance + bias, weights +slope and -slope, both
    logits 0 at `threshold` to begin with. Scores are the log-odds match - mismatch. The right sign
    of `slope` matters: with the wrong one, matching vectors are driven apart at the same loss.
    """

    def __init__(self, slope: float = 1.0, threshold: float = math.sqrt(2)) -> None:
        super().__init__()
        weight = torch.tensor([slope, -slope], dtype=torch.float32)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(-threshold * weight)

    def forward(self, a_QD: Tensor, b_CD: Tensor) -> Tensor:
        """(Q, D) and (C, D) -> (Q, C) log-odds of a match."""
        return _log_odds(self._affine(self.distances(a_QD, b_CD)))

    def pairs(self, a_PD: Tensor, b_PD: Tensor) -> Tensor:
        """(P, D) twice -> (P,) log-odds of a match."""
        return _log_odds(self.logits(a_PD, b_PD))

    def logits(self, a_PD: Tensor, b_PD: Tensor) -> Tensor:
        """(P, D) twice -> (P, 2): mismatch, match."""
        with _full_precision(a_PD):
            square_P = (_unit(a_PD) - _unit(b_PD)).square().sum(-1)
            return self._affine(_root(square_P))

    def distances(self, a_QD: Tensor, b_CD: Tensor) -> Tensor:
        """(Q, D) and (C, D) -> (Q, C) distances of the unit vectors, in [0, 2]."""
        with _full_precision(a_QD):
            return _root((2 - 2 * _unit(a_QD) @ _unit(b_CD).T).clamp(min=0))

    def _affine(self, distance: Tensor) -> Tensor:
        return distance[..., None] * wide(self.weight) + wide(self.bias)


class FusionMLP(nn.Module):
    """MLP on the concatenated vectors (L3-Net, 2017): Linear, ReLU, Linear to mismatch, match."""

    def __init__(self, dim_a: int, dim_b: int, hidden: int = 128) -> None:
        super().__init__()
        self.dim_a = dim_a
        self.hidden = nn.Linear(dim_a + dim_b, hidden)
        self.out = nn.Linear(hidden, 2)

    def forward(self, a_QD: Tensor, b_CD: Tensor) -> Tensor:
        """(Q, Da) and (C, Db) -> (Q, C) log-odds of a match; memory Q * C * hidden."""
        a_QH, b_CH = self._parts(a_QD, b_CD)
        return _log_odds(self._read(a_QH[:, None] + b_CH[None]))

    def pairs(self, a_PD: Tensor, b_PD: Tensor) -> Tensor:
        """(P, Da) and (P, Db) -> (P,) log-odds of a match."""
        return _log_odds(self.logits(a_PD, b_PD))

    def logits(self, a_PD: Tensor, b_PD: Tensor) -> Tensor:
        """(P, Da) and (P, Db) -> (P, 2): mismatch, match."""
        a_PH, b_PH = self._parts(a_PD, b_PD)
        return self._read(a_PH + b_PH)

    def _parts(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        # The first layer of a concatenation is a sum of two linear maps: each vector is mapped once
        # and not once per pair.
        weight, bias = self.hidden.weight, self.hidden.bias
        part_a = F.linear(a.to(weight.dtype), weight[:, : self.dim_a], bias)
        return part_a, F.linear(b.to(weight.dtype), weight[:, self.dim_a :])

    def _read(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.out(F.relu(hidden))
        return wide(logits)


class ScoreMap(nn.Module):
    """Similarities of video cells with audio steps, reduced to one score (matchmaps, DenseAV).

    `forward(video_QTSD, audio_CUD) -> (Q, C)`. For every audio step the similarities with all
    cells are reduced (`space`), then the steps (`time`). An averaging reducer never comes before a
    maximum: space mean with time max takes each cell's maximum over time first. So max-mean is MISA
    and DenseAV (Hamilton et al. 2024), mean-max SIMA and mean-mean SISA (Harwath et al. 2018),
    soft-mean LVS (Chen et al. 2021), max over cells of a pooled sound AVOL-Net and EZ-VSL. Padded
    and absent steps and cells are left out; a pair without any scores 0.

    aligned: an audio step meets only the cells of the video bin of its own instant. The audio is
      averaged to the T bins first, both sides covering the same stretch of time.
    normalize: `both` for the cosine, `steps` where the length of a cell counts (an empty one then
      scores 0, one that holds all of an object more than one that holds its corner), `none`.
    chunk: video rows that are compared at a time, 0 = all. The similarities of a chunk,
      chunk * C * T * S (times U / T unless aligned), are the only large tensor.
    heads: parts of the width that are compared one by one; the largest similarity counts.
    sharpness, above: of `lse` and `soft`, see `reducer`.
    below: for `background`, the `soft` mean of the cells below this similarity.
    """

    def __init__(
        self,
        space: Space = "max",
        time: Time = "mean",
        aligned: bool = False,
        normalize: Normalize = "both",
        chunk: int = 0,
        sharpness: float = 10.0,
        heads: int = 1,
        above: float = 0.0,
        below: float = 0.0,
    ) -> None:
        super().__init__()
        self.space, self.time = space, time
        self.aligned, self.normalize = aligned, normalize
        self.chunk, self.heads = chunk, heads
        self._over_cells = reducer(space, sharpness, above)
        self._over_steps = reducer(time)
        self._behind = reducer("soft", -sharpness, below)

    def forward(
        self,
        video_QTSD: Tensor,
        audio_CUD: Tensor,
        video_valid_QTS: Tensor | None = None,
        audio_valid_CU: Tensor | None = None,
        steps_per_bin: float | None = None,
    ) -> Tensor:
        """All videos against all audio clips.

        Args:
            video_QTSD: video cells.
            audio_CUD: audio steps.
            video_valid_QTS: bool, default all.
            audio_valid_CU: bool, default all.
            steps_per_bin: audio steps per video bin, for `aligned`; default U / T.

        Returns:
            (Q, C) scores.
        """
        with _full_precision(video_QTSD):
            audio, audio_valid = self._audio(audio_CUD, audio_valid_CU, video_QTSD, steps_per_bin)
            video = self._cells(video_QTSD)

            def score(rows: slice) -> Tensor:
                valid = None if video_valid_QTS is None else video_valid_QTS[rows]
                equation = "ctd,qtsd->qcts" if self.aligned else "cud,qnd->qcun"
                cells = video[rows] if self.aligned else video[rows].flatten(1, 2)
                # Audio first: einsum then leaves the cells, reduced first, contiguous.
                sims = _best(self._products(equation, audio, cells))
                steps = None if audio_valid is None else audio_valid[None, :, :, None]
                return self._reduce(sims, self._cell_mask(valid), steps)

            return in_row_chunks(score, video.shape[0], self.chunk or max(1, video.shape[0]))

    def pairs(
        self,
        video_PTSD: Tensor,
        audio_PUD: Tensor,
        video_valid_PTS: Tensor | None = None,
        audio_valid_PU: Tensor | None = None,
        steps_per_bin: float | None = None,
        background: bool = False,
    ) -> Tensor:
        """Each video with its own audio -> (P,); arguments as `forward`.

        background: the score of the cells that do not match instead (the constructor's `below`).
        """
        parts, steps = self._paired(video_PTSD, audio_PUD, audio_valid_PU, steps_per_bin)
        steps = None if steps is None else steps[:, None, :, None]
        cells = self._cell_mask(video_valid_PTS)
        return self._reduce(_best(parts)[:, None], cells, steps, background)[:, 0]

    def maps(
        self,
        video_PTSD: Tensor,
        audio_PUD: Tensor,
        audio_valid_PU: Tensor | None = None,
        steps_per_bin: float | None = None,
    ) -> Tensor:
        """Where each audio is seen in its video -> (P, T, S).

        Aligned: the similarity of a cell with the audio of its own bin, 0 where the bin has no
        audio. Otherwise: reduced over the audio steps as in the score.
        """
        parts, valid = self._paired(video_PTSD, audio_PUD, audio_valid_PU, steps_per_bin)
        sims = _best(parts)
        if not self.aligned:
            mask = None if valid is None else valid[:, None].expand(-1, sims.shape[2], -1)
            over = self._over_steps(sims.transpose(1, 2), mask)
            return over.reshape(video_PTSD.shape[:3])
        if valid is None:
            return sims
        return torch.where(valid[..., None], sims, torch.zeros_like(sims))

    def by_head(
        self,
        video_PTSD: Tensor,
        audio_PUD: Tensor,
        audio_valid_PU: Tensor | None = None,
        steps_per_bin: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Similarities of paired rows, head by head.

        Returns:
            (P, U, N, K) and the valid steps (P, U), None for all; when aligned (P, T, S, K) and the
            bins (P, T) that have audio.
        """
        parts, valid = self._paired(video_PTSD, audio_PUD, audio_valid_PU, steps_per_bin)
        return torch.stack(parts, -1), valid

    def _paired(
        self,
        video_PTSD: Tensor,
        audio_PUD: Tensor,
        audio_valid_PU: Tensor | None,
        steps_per_bin: float | None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """`by_head` as a list."""
        with _full_precision(video_PTSD):
            audio, valid = self._audio(audio_PUD, audio_valid_PU, video_PTSD, steps_per_bin)
            video = self._cells(video_PTSD)
            if self.aligned:
                return self._products("ptd,ptsd->pts", audio, video), valid
            return self._products("pud,pnd->pun", audio, video.flatten(1, 2)), valid

    def _products(self, equation: str, audio: Tensor, cells: Tensor) -> list[Tensor]:
        """Products of the heads' parts of the width."""
        if self.heads == 1:
            return [torch.einsum(equation, audio, cells)]
        parts = zip(audio.chunk(self.heads, -1), cells.chunk(self.heads, -1), strict=True)
        return [torch.einsum(equation, a, c) for a, c in parts]

    def _audio(
        self, audio: Tensor, valid: Tensor | None, video: Tensor, steps_per_bin: float | None
    ) -> tuple[Tensor, Tensor | None]:
        audio = wide(audio)
        if self.aligned:
            audio, valid = to_bins(audio, valid, video.shape[1], steps_per_bin)
        return (audio if self.normalize == "none" else self._units(audio)), valid

    def _cells(self, video: Tensor) -> Tensor:
        return self._units(video) if self.normalize == "both" else wide(video)

    def _units(self, x: Tensor) -> Tensor:
        if self.heads == 1:
            return _unit(x)
        return _unit(x.reshape(*x.shape[:-1], self.heads, -1)).reshape(x.shape)

    def _cell_mask(self, valid_QTS: Tensor | None) -> Tensor | None:
        """Broadcasts against (Q, C, steps, cells)."""
        if valid_QTS is None:
            return None
        return valid_QTS[:, None] if self.aligned else valid_QTS.flatten(1)[:, None, None]

    def _reduce(
        self,
        sims_QCUN: Tensor,
        cells: Tensor | None,
        steps: Tensor | None,
        background: bool = False,
    ) -> Tensor:
        mask = cells if steps is None else steps if cells is None else cells & steps
        mask = None if mask is None else mask.expand(sims_QCUN.shape)
        inner, outer = self._behind if background else self._over_cells, self._over_steps
        if self.space == "mean" and self.time == "max":
            inner, outer = outer, inner
            sims_QCUN = sims_QCUN.transpose(2, 3)
            mask = None if mask is None else mask.transpose(2, 3)
        return outer(inner(sims_QCUN, mask), None if mask is None else mask.any(-1))


def to_bins(
    audio_CUD: Tensor, valid_CU: Tensor | None, bins: int, steps_per_bin: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Average U audio steps to T video bins by their overlap in time, leaving out invalid steps.

    Bin t covers the steps [t * r, (t + 1) * r) with r = `steps_per_bin`, U / T by default, which
    may be below 1.

    Returns:
        audio (C, T, D), 0 where a bin has no valid step, and valid (C, T) or None for all.
    """
    steps = audio_CUD.shape[1]
    if steps == bins and steps_per_bin in (None, 1):
        return audio_CUD, valid_CU
    ratio = steps / bins if steps_per_bin is None else steps_per_bin
    start_T1 = torch.arange(bins, dtype=torch.float64)[:, None] * ratio
    start_U = torch.arange(steps, dtype=torch.float64)
    overlap_TU = torch.minimum(start_T1 + ratio, start_U + 1) - torch.maximum(start_T1, start_U)
    # Rounding in t * r must not open a bin to a step that it only touches.
    overlap_TU = torch.where(overlap_TU > 1e-6, overlap_TU, torch.zeros_like(overlap_TU))
    overlap_TU = overlap_TU.to(device=audio_CUD.device, dtype=audio_CUD.dtype)
    if valid_CU is None:
        valid_CU = torch.ones(audio_CUD.shape[:2], dtype=torch.bool, device=audio_CUD.device)
    kept_CUD = torch.where(valid_CU[..., None], audio_CUD, torch.zeros_like(audio_CUD))
    weight_CT = valid_CU.to(audio_CUD.dtype) @ overlap_TU.T
    valid_CT = weight_CT > 0
    total_CTD = torch.einsum("tu,cud->ctd", overlap_TU, kept_CUD)
    safe_CT = torch.where(valid_CT, weight_CT, torch.ones_like(weight_CT))
    return total_CTD / safe_CT[..., None], valid_CT


def _best(parts: list[Tensor]) -> Tensor:
    """The largest of the heads' similarities."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, -1).amax(-1)


def _unit(x: Tensor) -> Tensor:
    # A larger floor than torch's: a zero vector would otherwise have a gradient of 10^12.
    return F.normalize(wide(x), dim=-1, eps=1e-6)


def _root(square: Tensor) -> Tensor:
    # The gradient of the root is infinite at 0.
    return (square + 1e-12).sqrt()


def _log_odds(logits: Tensor) -> Tensor:
    return logits[..., 1] - logits[..., 0]


def _full_precision(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
