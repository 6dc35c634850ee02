"""`mmssl eval sync RUN`: does a model hear whether sound and picture are in time?

In sync against shifted by 1 to 4 s (accuracy, AUC), and which of 21 offsets from -2 to +2 s a pair
of windows has. The decoder's own error is measured first: without it the container is measured.
Left out: SyncNet's search over +-15 frames at 25 fps, and its distances LSE-D and LSE-C.

Letters in shapes: B rows of a batch, P items of a view, N clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mmssl.eval import decide
from mmssl.eval.bootstrap import interval
from mmssl.eval.clapper import alignment_error
from mmssl.eval.embed import Encoder, Rows, encoded_once, first_view, frozen, present
from mmssl.eval.features import SIGNAL, cut, whole_views
from mmssl.eval.items import Metrics
from mmssl.eval.results import Results, interval_of, plot
from mmssl.eval.session import RANDOM, TRAINED, Session, SuiteSpec
from mmssl.rng import seed_of
from mmssl.specs import ViewSpec
from mmssl.types import Batch, UserError

Floats = NDArray[np.float64]
Scores = dict[str, Floats]

OFFSETS_S = np.round(np.arange(-10, 11) * 0.2, 1)


class Options(SuiteSpec):
    """What can be set behind `mmssl eval sync RUN`."""

    window_s: float = Field(0.0, ge=0)  # length of what is compared; 0 = each view's own crop
    min_shift_s: float = Field(1.0, gt=0)
    max_shift_s: float = Field(4.0, gt=0)
    offsets: bool = True  # also the 21 offsets, for clips at least 4 s longer than a window


@dataclass(frozen=True)
class Draw:
    """Windows of one clip: starts (s) of the pictures, the sound in sync, and the shifted sound.

    center_s: middle of the candidates for the sound, right: number of the one in sync; None where
    the clip is too short for offsets. The film is then `center_s` + that offset.
    """

    film_s: float
    shifted_s: float
    center_s: float | None
    right: int


@dataclass
class Collected:
    """Scores of N clips by model and scorer: in sync and shifted; (N, 21) of the candidates."""

    rows: Rows = field(default_factory=Rows)
    draws: list[Draw] = field(default_factory=list)
    short: int = 0
    yes: dict[str, list[Floats]] = field(default_factory=dict)
    no: dict[str, list[Floats]] = field(default_factory=dict)
    tables: dict[str, list[Floats]] = field(default_factory=dict)


def evaluate(session: Session) -> Results:
    """Results of the suite.

    Raises:
        UserError: no sound or no pictures, clips that are too short, a method that compares
            neither.
    """
    options = cast("Options", session.options)
    decoder = alignment_error(session.spec.data.decoder)
    found, metas = collect(session, options, cuts_of(session, options))
    result = session.facts("sync", metas)
    kinds = {name: _numbers(session, found, name) for name in found.yes}
    by_model: dict[str, Metrics] = {}
    for name, numbers in kinds.items():
        model, _, scorer = name.partition("/")
        by_model.setdefault(model, {})[scorer] = numbers
    long = sum(one.center_s is not None for one in found.draws)
    facts = {"n": len(found.draws), "too_short": found.short, "n_offsets": long}
    result["sync"] = {"decoder_error": decoder, **facts, **by_model[TRAINED]}
    result["trivial"] = {"sync": by_model[SIGNAL]}
    if RANDOM in by_model:
        result["random_encoder"] = {"sync": by_model[RANDOM]}
    result["plots"] = _plots(kinds, decoder)
    return result


def cuts_of(session: Session, options: Options) -> dict[str, ViewSpec]:
    """Views of sound and pictures with the length of their windows as `crop_s`.

    Without `window_s` each keeps its own; a view of whole clips takes the longest of the others.

    Raises:
        UserError: all views take whole clips and no length is given, or a modality is lacking.
    """
    names = [session.view_of(modality)[0] for modality in ("audio", "video")]
    views = {n: v for n, v in session.spec.views.items() if v.modality in ("audio", "video")}
    longest = options.window_s or max(views[name].crop_s for name in names)
    if longest == 0:
        raise UserError("sync: the run's views take whole clips; give window_s=SECONDS")
    if options.min_shift_s > options.max_shift_s:
        raise UserError("sync: min_shift_s is above max_shift_s")
    lengths = {name: options.window_s or view.crop_s or longest for name, view in views.items()}
    return {n: view.model_copy(update={"crop_s": lengths[n]}) for n, view in views.items()}


# --- windows


def collect(
    session: Session, options: Options, cuts: Mapping[str, ViewSpec]
) -> tuple[Collected, list[dict[str, Any]]]:
    """Scores of all clips that are long enough, and the meta of all."""
    found, metas = Collected(), []
    film = cuts[session.view_of("video")[0]]
    window_s, longest = _longest(cuts), 0.0
    lead_s = (window_s - film.crop_s) / 2
    with frozen(session.models.values()):
        for batch in session.batches(whole_views(session.spec.views)):
            metas += batch.meta
            there = (present(batch, "audio") & present(batch, "video")).tolist()
            longest = max([longest, *(float(meta["duration_s"]) for meta in batch.meta)])
            draws = [
                draw(
                    meta["duration_s"] - window_s,
                    film.fps,
                    options,
                    seed_of(options.seed, key),
                    lead_s,
                )
                if both
                else None
                for meta, key, both in zip(batch.meta, batch.keys, there, strict=True)
            ]
            found.short += sum(both and one is None for both, one in zip(there, draws, strict=True))
            if any(draws):
                _score(session, found, batch, draws, cuts)
    if not found.draws:
        raise UserError(
            f"{session.folder}: no clip with sound and pictures holds a window of {window_s:g} s "
            f"and one {options.min_shift_s:g} s later (the longest has {longest:g} s); give a "
            "shorter window_s="
        )
    return found, metas


def draw(
    room_s: float, fps: float, options: Options, seed: int, lead_s: float = 0.0
) -> Draw | None:
    """Windows of a clip that is `room_s` longer than one; None if no shift fits.

    The shift is uniform in size and sign, then the place; pictures, which begin `lead_s` inside
    their window, begin with a frame.
    """
    rng = np.random.default_rng(seed % 2**63)
    most = min(options.max_shift_s, room_s)
    if most < options.min_shift_s - 1e-6:
        return None
    shift = float(rng.uniform(options.min_shift_s, max(most, options.min_shift_s)))
    shift *= float(rng.choice([-1, 1]))
    low, high = max(0.0, -shift), room_s - max(0.0, shift)
    film_s = min(_snap(float(rng.uniform(low, high)), fps, lead_s), room_s)
    right = int(rng.integers(len(OFFSETS_S)))
    reach = float(OFFSETS_S[-1])
    center = None
    if options.offsets and room_s >= 2 * reach:
        start = float(rng.uniform(reach, room_s - reach)) + OFFSETS_S[right]
        center = float(_snap(start, fps, lead_s) - OFFSETS_S[right])
    return Draw(film_s, film_s + shift, center, right)


def _snap(start_s: float, fps: float, lead_s: float) -> float:
    """The nearest start of a window whose pictures begin with a frame."""
    return round((start_s + lead_s) * fps) / fps - lead_s


def _longest(cuts: Mapping[str, ViewSpec]) -> float:
    return max(view.crop_s for view in cuts.values())


def windows(batch: Batch, film_B: Floats, sound_B: Floats, cuts: Mapping[str, ViewSpec]) -> Batch:
    """The batch with pictures and sound from these times (s) on; silence or black outside.

    The times are those of the longest window; shorter ones are around its middle.
    """
    starts, window_s = {"video": film_B, "audio": sound_B}, _longest(cuts)
    views = {
        name: cut(view, cuts[name], starts[view.modality] + (window_s - cuts[name].crop_s) / 2)
        for name, view in batch.views.items()
        if name in cuts
    }
    return replace(batch, views=batch.views | views)


# --- scores


def _score(
    session: Session,
    found: Collected,
    batch: Batch,
    draws: list[Draw | None],
    cuts: Mapping[str, ViewSpec],
) -> None:
    kept = np.flatnonzero([one is not None for one in draws])
    chosen = [one or Draw(0.0, 0.0, None, 0) for one in draws]
    film_B = np.asarray([one.film_s for one in chosen])
    for target, sound_B in (
        (found.yes, film_B),
        (found.no, np.asarray([one.shifted_s for one in chosen])),
    ):
        for name, scores in _all_scores(session, windows(batch, film_B, sound_B, cuts)).items():
            target.setdefault(name, []).append(scores[kept])
    found.rows.add_some(batch, kept.tolist())
    found.draws += [chosen[i] for i in kept]
    long = np.flatnonzero([one.center_s is not None for one in chosen])
    if len(long) == 0:
        return
    center_B = np.asarray([one.center_s or 0.0 for one in chosen])
    film_B = center_B + OFFSETS_S[[one.right for one in chosen]]
    columns: dict[str, list[Floats]] = {}
    for offset in OFFSETS_S:
        part = windows(batch, film_B, center_B + offset, cuts)
        for name, scores in _all_scores(session, part).items():
            columns.setdefault(name, []).append(scores[long])
    for name, parts in columns.items():
        found.tables.setdefault(name, []).append(np.stack(parts, axis=1))


def _all_scores(session: Session, batch: Batch) -> Scores:
    """(B,) scores by `model/scorer`, and of the signal."""
    found = {f"{SIGNAL}/correlation": correlation(batch)}
    for name, model in session.models.items():
        moved = batch.to(next(iter(model.parameters())).device)
        with encoded_once(model, moved):
            own = scores_of(model, moved)
        found |= {f"{name}/{scorer}": scores for scorer, scores in own.items()}
    if len(found) == 1:
        raise UserError(
            "sync: the run's method compares sound and pictures neither by a match task, nor in a "
            "common space, nor by a map score; evaluate another run"
        )
    return found


def scores_of(model: Encoder, batch: Batch) -> Scores:
    """(B,) what a model offers: `match` logit, `cosine` of vectors, `map`: mean highest cell."""
    found: dict[str, Tensor] = {}
    match = model.match_logit(batch, torch.arange(batch.size, device=batch.source_B.device))
    if match is not None:
        found["match"] = match
    space, vectors = model.space_for("audio", "video"), model.embed(batch)
    if space is not None:
        found["cosine"] = (vectors["audio", space][0] * vectors["video", space][0]).sum(-1)
    dense = model.dense(batch)
    if dense is not None:
        maps_PTS = model.score_maps(dense.video, dense.audio, dense.audio_valid)
        found["map"] = maps_PTS.amax(-1).mean(-1)
    return {name: x.double().cpu().numpy() for name, x in found.items()}


def correlation(batch: Batch) -> Floats:
    """(B,) of what moves between frames with how loud the sound is meanwhile; 0 if constant.

    Of windows of two lengths the middle of the longer one counts.
    """
    film, sound = first_view(batch, "video"), first_view(batch, "audio")
    out_B = np.zeros(batch.size)
    if film is None or sound is None or not sound.data.is_floating_point():
        return out_B
    item = {int(row): p for p, row in enumerate(sound.rows_P)}
    seconds = min(view.data.shape[1] / view.rate for view in (film, sound))
    frames_PT, waves_PS = (_middle(x.data, round(seconds * x.rate)) for x in (film, sound))
    for p, row in enumerate(film.rows_P.tolist()):
        if row not in item or frames_PT.shape[1] < 3:
            continue
        motion_T = frames_PT[p].float().diff(dim=0).abs().mean((1, 2, 3)).numpy()
        parts = np.array_split(waves_PS[item[row]].double().numpy(), frames_PT.shape[1])
        loud_T = np.asarray([np.sqrt(np.mean(part**2)) for part in parts])[1:]
        if motion_T.std() > 0 and loud_T.std() > 0:
            out_B[row] = np.corrcoef(motion_T, loud_T)[0, 1]
    return out_B


def _middle(data: Tensor, count: int) -> Tensor:
    skip = (data.shape[1] - count) // 2
    return data[:, skip : skip + count]


# --- numbers


def _numbers(session: Session, found: Collected, name: str) -> Metrics:
    """Binary decision and offsets of one scorer."""
    yes_N, no_N = (np.concatenate(part[name]) for part in (found.yes, found.no))
    sources = np.asarray(found.rows.sources)
    protocol = session.protocol
    result: Metrics = {
        "auc": decide.auc(yes_N, no_N),
        "paired": float(((yes_N > no_N) + 0.5 * (yes_N == no_N)).mean()),
        "chance": 0.5,
        "n": len(yes_N),
    }
    first = decide.halves(sources, protocol.seed)
    if not first.all():
        right_N = decide.crossed(yes_N, no_N, first)
        result["accuracy"] = float(right_N.mean())
        if protocol.resamples:
            bounds = interval(right_N, sources, "mean", protocol.resamples, protocol.seed)
            result["ci"] = {"accuracy": list(bounds)}
        if name.startswith(TRAINED):
            prefix = f"sync.{name.partition('/')[2]}"
            session.items.add(f"{prefix}.right", found.rows, range(len(right_N)), right_N)
    if found.tables:
        right = [one.right for one in found.draws if one.center_s is not None]
        result["offsets"] = offset_numbers(np.concatenate(found.tables[name]), np.asarray(right))
    return result


def offset_numbers(scores_NC: Floats, right_N: NDArray[np.int64]) -> Metrics:
    """Top-1 and +-1-class accuracy, chance, and the mean error (s); ties against the model."""
    classes = np.arange(scores_NC.shape[1])
    result: Metrics = {"n": len(right_N)}
    for name, slack in (("accuracy", 0), ("within_one", 1)):
        near_NC = np.abs(classes[None] - right_N[:, None]) <= slack
        best = np.where(near_NC, scores_NC, -np.inf).max(axis=1)
        other = np.where(near_NC, -np.inf, scores_NC).max(axis=1)
        result[name] = float((best > other).mean())
        result[f"chance_{name}"] = float(near_NC.mean())
    # the farthest of the highest; also of scores that are no numbers
    below_NC = scores_NC < scores_NC.max(axis=1, keepdims=True)
    error_N = np.where(below_NC, 0, np.abs(classes[None] - right_N[:, None])).max(axis=1)
    return result | {"mean_error_s": float(0.2 * error_N.mean())}


def _plots(kinds: Mapping[str, Metrics], decoder: Metrics) -> list[Results]:
    x = ["accuracy", "AUC", "paired", "offset", "offset ±1"]
    lines = {}
    for name, row in sorted(kinds.items(), key=lambda item: not item[0].startswith(TRAINED)):
        parts = row.get("offsets") or {}
        binary = [row.get("accuracy"), row["auc"], row["paired"]]
        lines[name] = [*binary, parts.get("accuracy"), parts.get("within_one")]
    chance: Metrics = next((row["offsets"] for row in kinds.values() if "offsets" in row), {})
    near = chance.get("chance_accuracy"), chance.get("chance_within_one")
    lines["chance"] = [0.5, 0.5, 0.5, *near]
    bounds = {
        name: [interval_of(row, "accuracy"), None, None, None, None] for name, row in kinds.items()
    }
    error = decoder["mean_ms"]
    note = "could not be measured" if error is None else f"{error:+.1f} ms"
    return [plot(f"In time or not (the decoder's own error: {note})", "score", x, lines, bounds)]
