"""Localization where boxes follow a sounding and a silent object: pointing, and still maps by cIoU.

Letters in shapes: P rows with boxes, T time bins, S cells, A audio steps, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.eval import ciou, localize
from mmssl.eval.bootstrap import interval
from mmssl.eval.embed import DenseRows, Encoder, Rows
from mmssl.eval.items import ItemTable, Metrics, Protocol
from mmssl.types import UserError

Floats = NDArray[np.float64]

_MAPS = 64  # clips per block of score maps


@dataclass(frozen=True)
class Scene:
    """Ground truth of the P localization rows on the grid of the score maps."""

    grid_HW: tuple[int, int]
    sounding_PT4: Floats
    silent_PT4: Floats
    sources_P: NDArray[np.generic]
    partners_P: NDArray[np.int64]


def scene(rows: Rows, dense: DenseRows, side: int, seed: int) -> Scene:
    """Boxes at the time bins, and for each clip another one that sounds like its silent object.

    Args:
        rows: the whole test set.
        dense: the rows with boxes.
        side: side of the picture the model sees, 0 = as stored.
        seed: of the choice of the other clip.
    """
    meta = [rows.meta[i] for i in dense.rows_P]
    tracks = {
        name: np.stack(
            [box_track(m, name, side, t) for m, t in zip(meta, dense.times_PT, strict=True)]
        )
        for name in ("sounding", "silent")
    }
    sources = [rows.sources[i] for i in dense.rows_P]
    partners_P = localize.partners(
        [m.get("silent_class") for m in meta],
        [m.get("class") for m in meta],
        sources,
        sources,
        seed,
    )
    grid_HW = (dense.grid[1], dense.grid[2])
    return Scene(grid_HW, tracks["sounding"], tracks["silent"], np.asarray(sources), partners_P)


def box_track(meta: Metrics, name: str, side: int, times_T: Floats) -> Floats:
    """(T, 4) box of an object at the given times (s), as places in the picture the model sees.

    Raises:
        UserError: the boxes lack their frame rate or do not fit their frame.
    """
    boxes = meta["boxes"]
    if not boxes.get("fps"):
        raise UserError("localization: `boxes` of a clip lacks `fps`, the boxes per second")
    width, height = boxes.get("frame") or meta["stored_size"]
    pixels = np.asarray(boxes[name], dtype=np.float64)
    if (pixels[:, 2:] > np.asarray([width, height]) + 1).any():
        raise UserError(
            f"boxes reach beyond the frame of {width} x {height} pixels; if the video "
            "was scaled, give `boxes` the entry `frame`: [width, height] of the unscaled frame"
        )
    places = localize.to_view(pixels, (width, height), side)
    return localize.boxes_at(places, float(boxes["fps"]), times_T)


def score_maps(model: Encoder, video_PTSD: Tensor, audio_PAD: Tensor, valid_PA: Tensor) -> Floats:
    """(P, T, S) maps of paired rows, in blocks."""
    device = next(iter(model.parameters())).device
    blocks = []
    for begin in range(0, len(video_PTSD), _MAPS):
        part = (x[begin : begin + _MAPS].to(device) for x in (video_PTSD, audio_PAD, valid_PA))
        with torch.inference_mode():
            blocks.append(model.score_maps(*part).double().cpu().numpy())
    return np.concatenate(blocks)


def blind_audio(audio_PAD: Tensor, valid_PA: Tensor) -> tuple[Tensor, Tensor]:
    """The test set's mean audio as every row's audio: (P, A, D) and its validity.

    Each step is the mean over the clips, brought back to the mean length of the true features, so
    that only the direction, not the scale of the scores, is changed.
    """
    weight_PA1 = valid_PA[..., None].to(audio_PAD.dtype)
    mean_AD = (audio_PAD * weight_PA1).sum(0) / weight_PA1.sum(0).clamp(min=1)
    length = audio_PAD.norm(dim=-1)[valid_PA].mean()
    mean_AD = mean_AD / mean_AD.norm(dim=-1, keepdim=True).clamp(min=1e-12) * length
    return mean_AD.expand_as(audio_PAD), valid_PA.any(dim=0).expand_as(valid_PA)


def localization_maps(model: Encoder, dense: DenseRows, truth: Scene) -> dict[str, Floats]:
    """Score maps (P, T, S) by audio: `own`, `swapped` (rows with a partner only), `blind`."""
    swaps = np.flatnonzero(truth.partners_P >= 0)
    other = truth.partners_P[swaps]
    video, audio, valid = dense.video_PTSD, dense.audio_PAD, dense.valid_PA
    maps = {"own": score_maps(model, video, audio, valid)}
    maps["blind"] = score_maps(model, video, *blind_audio(audio, valid))
    if len(swaps):
        maps["swapped"] = score_maps(model, video[swaps], audio[other], valid[other])
    return maps


def localization(
    maps: dict[str, Floats], rows: Rows, dense: DenseRows, truth: Scene, protocol: Protocol
) -> Metrics:
    """Pointing with the own, the swapped and the averaged audio, trivial answers, and cIoU.

    A value of None means that no clip could be tested (no clip of the silent object's class).
    """
    boxes = (truth.sounding_PT4, truth.silent_PT4)
    own = localize.point(maps["own"], truth.grid_HW, *boxes)
    blind = localize.point(maps["blind"], truth.grid_HW, *boxes)
    frames_PT = localize.point_frames(maps["own"], truth.grid_HW, *boxes)
    columns: dict[str, tuple[NDArray[Any], NDArray[np.generic]]] = {
        "pointing_sounding": (own.sounding_P, truth.sources_P),
        "pointing_silent": (own.silent_P, truth.sources_P),
        "pointing_both": (own.both_P, truth.sources_P),
        "pointing_frames": (
            frames_PT[dense.loud_PT],
            np.repeat(truth.sources_P, dense.loud_PT.sum(axis=1)),
        ),
        "pointing_audio_blind": (blind.sounding_P, truth.sources_P),
        "pointing_center": (localize.point_centre(*boxes), truth.sources_P),
        "pointing_whole_image": (
            localize.point_anywhere(truth.grid_HW, *boxes),
            truth.sources_P,
        ),
    }
    columns |= _swapped_columns(maps, truth)
    if protocol.items is not None:
        _record_pointing(protocol.items, rows, dense, truth, columns)
    result: Metrics = {name: _mean(values) for name, (values, _) in columns.items()}
    result |= {"n": len(truth.sources_P), "n_swapped": int((truth.partners_P >= 0).sum())}
    result["n_frames"] = int(dense.loud_PT.sum())
    result["ciou"] = _still_maps(maps, own, truth)
    if protocol.resamples:
        result["ci"] = {
            name: _bounds(interval(values, sources, "mean", protocol.resamples, protocol.seed))
            for name, (values, sources) in columns.items()
        }
    return result


def _record_pointing(
    items: ItemTable,
    rows: Rows,
    dense: DenseRows,
    truth: Scene,
    columns: Mapping[str, tuple[NDArray[Any], NDArray[np.generic]]],
) -> None:
    swapped = dense.rows_P[truth.partners_P >= 0]
    for name in ("sounding", "silent", "audio_blind", "center", "swapped_audio"):
        kept = swapped if name == "swapped_audio" else dense.rows_P
        items.add(f"localization.pointing_{name}", rows, kept, columns[f"pointing_{name}"][0])


def _swapped_columns(
    maps: dict[str, Floats], truth: Scene
) -> dict[str, tuple[NDArray[Any], NDArray[np.generic]]]:
    """With audio of the silent object's class the peak should move to the silent object."""
    rows = np.flatnonzero(truth.partners_P >= 0)
    sources = truth.sources_P[rows]
    names = ("pointing_swapped_audio", "pointing_swapped_stays")
    if len(rows) == 0:
        return {name: (np.zeros(0), sources) for name in names}
    found = localize.point(
        maps["swapped"], truth.grid_HW, truth.sounding_PT4[rows], truth.silent_PT4[rows]
    )
    return dict(zip(names, ((found.silent_P, sources), (found.sounding_P, sources)), strict=True))


def _still_maps(maps: dict[str, Floats], own: localize.Pointing, truth: Scene) -> Metrics:
    """CIoU of the time bin with the highest cell, beside what needs no model or no sound."""
    shapes = {"model": maps["own"], "audio_blind": maps["blind"]}
    rows = np.arange(len(own.bin_P))
    weights = [ciou.weight_map(truth.sounding_PT4[p, own.bin_P[p]][None]) for p in rows]
    kept = [p for p in rows if weights[p].any()]
    truths = [weights[p] for p in kept]
    if not kept:
        return {"n": 0, "empty": len(rows)}
    pictures: dict[str, Sequence[Floats]] = {
        name: [
            ciou.upsample(m[p, own.bin_P[p]].reshape(truth.grid_HW), align_corners=False)
            for p in kept
        ]
        for name, m in shapes.items()
    }
    pictures["center"] = [ciou.centre_map()] * len(kept)
    result: Metrics = {name: ciou.ciou_summary(p, truths) for name, p in pictures.items()}
    whole = [ciou.ciou(np.ones(g.shape, dtype=bool), g) for g in truths]
    result["whole_image"] = ciou.rates(whole)
    return result | {"n": len(kept), "empty": len(rows) - len(kept)}


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def _bounds(pair: tuple[float, float]) -> list[float] | None:
    return None if np.isnan(pair[0]) else list(pair)
