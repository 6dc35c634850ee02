"""Frozen features of clips: a layer of a tower, pooled over its valid tokens or frame by frame.

Left out: the learned weighted sum of all layers (as in SUPERB); `layer=all` sets them side by side.

Letters in shapes: N clips, P items of a view, T time steps, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.eval.embed import Rows, frozen
from mmssl.eval.session import Session, SuiteSpec
from mmssl.specs import Modality, ViewSpec
from mmssl.towers import AnyTower, Tower, time_steps
from mmssl.types import Batch, UserError, ViewBatch
from mmssl.views import wave

if TYPE_CHECKING:
    from mmssl.model import Model

Singles = NDArray[np.float32]
Pool = Literal["mean", "mean_std", "mean_std_max"]

SIGNAL = "signal"  # features of the signal itself, beside those of the models
_BANDS, _CELLS, _WORDS = 64, 4, 512


class FeatureSpec(SuiteSpec):
    """What can be set for suites that read frozen features of one modality."""

    modality: Modality = "audio"
    # "output" of the tower, a layer from 1 on, the "last" before a final norm, "all" side by side
    layer: str = "output"
    whole: bool = True  # read whole clips instead of the first `crop_s` seconds of the run's view


def whole_view(view: ViewSpec, whole: bool = True) -> ViewSpec:
    """A view as evaluation reads it: one caption, nothing mixed or augmented, clips uncut."""
    plain: dict[str, Any] = {"augment": [], "mix": None, "candidates": 1, "window": "clip"}
    return view.model_copy(update=plain | ({"crop_s": 0.0} if whole else {}))


def whole_views(views: Mapping[str, ViewSpec]) -> dict[str, ViewSpec]:
    """Views to be cut by `cut`: whole sounds and pictures, text as it is."""
    return {
        name: view if view.modality == "text" else whole_view(view) for name, view in views.items()
    }


def cut(view: ViewBatch, spec: ViewSpec, start_B: NDArray[np.float64]) -> ViewBatch:
    """A view of whole clips cut to `crop_s` seconds from these times on, by batch row.

    Outside the clip it is silent or black; `normalize` holds for the crop.
    """
    length = max(1, round(spec.crop_s * view.rate))
    data = view.data.new_zeros((len(view.data), length, *view.data.shape[2:]))
    start_P = torch.from_numpy(start_B)[view.rows_P.cpu()]
    for item, (start, own) in enumerate(
        zip(start_P.tolist(), view.start_s_P.tolist(), strict=True)
    ):
        first = round((start - own) * view.rate)
        low, high = max(first, 0), min(first + length, int(view.lengths_P[item]))
        if high > low:
            part = view.data[item, low:high]
            data[item, low - first : high - first] = (
                wave.normalize(part) if spec.normalize else part
            )
    return replace(
        view,
        data=data,
        lengths_P=torch.full_like(view.lengths_P, length),
        start_s_P=start_P.to(view.start_s_P),
        labels={},
    )


def layer_outputs(tower: AnyTower, view: ViewBatch, layer: str) -> tuple[list[Tensor], Tensor]:
    """(P, N, D) outputs of the layers that `layer` names, and padding (P, N).

    Raises:
        UserError: the tower has no such layer.
    """
    if layer == "output":
        tokens = tower.encode(view, 1.0)
        return [tokens.x_PND], tokens.pad_PN
    found, pad_PN = tower.layers(view) if isinstance(tower, Tower) else ([], view.present_BL)
    layers = found[1:]
    if layer == "all" and layers:
        return layers, pad_PN
    number = len(layers) if layer == "last" else int(layer) if layer.isdecimal() else 0
    if 1 <= number <= len(layers):
        return [layers[number - 1]], pad_PN
    raise UserError(
        f"layer={layer}: the tower has {len(layers)} transformer layers; give `output`, a number "
        "from 1 to that, `last` or `all`"
    )


def pooled(x_PND: Tensor, pad_PN: Tensor, pool: Pool = "mean") -> Tensor:
    """(P, D) mean over the valid tokens, beside it their deviation, and maximum, as `pool` says."""
    weight = (~pad_PN)[..., None].to(x_PND.dtype)
    count = weight.sum(1).clamp(min=1)
    mean = (x_PND * weight).sum(1) / count
    if pool == "mean":
        return mean
    std = (((x_PND - mean[:, None]).square() * weight).sum(1) / count).sqrt()
    if pool == "mean_std":
        return torch.cat([mean, std], -1)
    low = torch.finfo(x_PND.dtype).min
    high = x_PND.masked_fill(pad_PN[..., None], low).amax(1)
    return torch.cat([mean, std, torch.where(pad_PN.all(1)[:, None], 0.0, high)], -1)


# --- the signal itself


def signal_frames(view: ViewBatch, item: int) -> Tensor:
    """(T, D) what a trivial listener, viewer or reader sees of an item over time.

    Audio: 64 log-mel bands every 10 ms. Video: colours of 4 x 4 cells of each frame. Text: which
    word it is, ids modulo 512.
    """
    data = view.data[item, : int(view.lengths_P[item])].cpu()
    if not data.is_floating_point() and view.modality != "video":
        return torch.nn.functional.one_hot(data % _WORDS, _WORDS).float()
    if view.modality == "audio":
        return log_mel(data.float(), int(view.rate))
    cells = torch.nn.functional.adaptive_avg_pool2d(data.float().permute(0, 3, 1, 2), _CELLS)
    return cells.flatten(1) / 255


def log_mel(wave_S: Tensor, hz: int) -> Tensor:
    """(T, 64) log-mel bands: windows of 25 ms every 10 ms."""
    from torchaudio.transforms import MelSpectrogram

    window = round(0.025 * hz)
    size = 2 << (window - 1).bit_length()
    mel = MelSpectrogram(hz, size, window, round(0.01 * hz), n_mels=_BANDS)
    padded = torch.nn.functional.pad(wave_S, (0, max(0, size - len(wave_S))))
    return cast("Tensor", (mel(padded) + 1e-6).log().T)


def signal_statistics(view: ViewBatch) -> Tensor:
    """(P, 4 D) mean, deviation and maximum over time, and deviation of what changes."""
    rows = []
    for item in range(len(view.lengths_P)):
        x_TD = signal_frames(view, item)
        steps_TD = x_TD.diff(dim=0) if len(x_TD) > 1 else torch.zeros_like(x_TD)
        parts = [x_TD.mean(0), _std(x_TD), x_TD.amax(0), _std(steps_TD)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def _std(x_TD: Tensor) -> Tensor:
    return x_TD.std(0, correction=min(1, len(x_TD) - 1))


# --- clips of a session


@dataclass
class Features:
    """Vectors (N, D) of the clips that have the modality, by model or `signal`; the clips' rows."""

    rows: Rows
    absent: list[str]
    values: dict[str, Singles]


@dataclass
class ClipFrames:
    """One clip: frames (T, D), frames per second and centre of the first (s), by model."""

    key: str
    meta: dict[str, Any]
    frames: dict[str, Singles] = field(default_factory=dict)
    rate_hz: dict[str, float] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)


def clip_features(session: Session, pool: Pool = "mean") -> Features:
    """Pooled features of every clip.

    Raises:
        UserError: run or clips lack the modality, or the tower the layer.
    """
    options = cast("FeatureSpec", session.options)
    found: dict[str, list[Singles]] = {}
    rows = Rows()
    absent: list[str] = []
    for name, batch in present_batches(session, absent):
        view = batch.views[name]
        for model_name, model in session.models.items():
            tower, moved = tower_of(session, model, name), moved_batch(model, batch).views[name]
            layers, pad_PN = layer_outputs(tower, moved, options.layer)
            vectors = torch.cat([pooled(x, pad_PN, pool) for x in layers], -1)
            found.setdefault(model_name, []).append(vectors.float().cpu().numpy())
        found.setdefault(SIGNAL, []).append(signal_statistics(view).numpy())
        rows.add_some(batch, view.rows_P.tolist())
    return Features(rows, absent, {key: np.concatenate(parts) for key, parts in found.items()})


def clip_frames(session: Session) -> Iterator[ClipFrames]:
    """Frames of every clip that has the modality; cells of one time step are averaged.

    Raises:
        UserError: as `clip_features`; or several layers are asked for.
    """
    options = cast("FeatureSpec", session.options)
    if options.layer == "all":
        raise UserError("layer=all: this suite compares frames of one layer; name one")
    for name, batch in present_batches(session, []):
        view = batch.views[name]
        clips = [ClipFrames(batch.keys[int(row)], batch.meta[int(row)]) for row in view.rows_P]
        for model_name, model in session.models.items():
            tower, moved = tower_of(session, model, name), moved_batch(model, batch).views[name]
            tokens = tower.encode(moved, 1.0)
            layers, _ = layer_outputs(tower, moved, options.layer)
            x_PTD, pad_PT = time_steps(replace(tokens, x_PND=layers[0]))
            first_s = tower.first_centre() / tokens.rate_hz if tokens.rate_hz else 0.0
            for clip, x, pad in zip(clips, x_PTD, pad_PT, strict=True):
                clip.frames[model_name] = x[~pad].float().cpu().numpy()
                clip.rate_hz[model_name], clip.first_s[model_name] = tokens.rate_hz, first_s
        for item, clip in enumerate(clips):
            clip.frames[SIGNAL] = signal_frames(view, item).numpy()
            audio = view.modality == "audio" and view.data.is_floating_point()
            clip.rate_hz[SIGNAL], clip.first_s[SIGNAL] = 100.0 if audio else view.rate, 0.0
            yield clip


def present_batches(session: Session, absent: list[str]) -> Iterator[tuple[str, Batch]]:
    """Batches that hold the options' modality, with its view's name; notes clips without it.

    The models are frozen meanwhile.
    """
    options = cast("FeatureSpec", session.options)
    name, view = session.view_of(options.modality)
    seen = False
    with frozen(session.models.values()):
        for batch in session.batches({name: whole_view(view, options.whole)}):
            there_B = batch.views[name].present_B.tolist()
            absent += [key for key, there in zip(batch.keys, there_B, strict=True) if not there]
            if any(there_B):
                seen = True
                yield name, batch
    if not seen:
        raise UserError(
            f"{session.folder}: no clip holds {options.modality}; choose modality= among what the "
            "clips hold, or other data="
        )


def tower_of(session: Session, model: Model, view: str) -> AnyTower:
    """The tower that reads a view of the session's run."""
    return cast("AnyTower", model.towers[session.spec.views[view].tower_name])


def moved_batch(model: Model, batch: Batch) -> Batch:
    """The batch on the model's device."""
    return batch.to(next(iter(model.parameters())).device)
