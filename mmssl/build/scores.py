"""Map scores from their specs, for tasks that compare video cells with sounds or captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmssl.build.targets import shows_motion
from mmssl.build.towers import need_view
from mmssl.heads.dense import MapScore
from mmssl.heads.score import ScoreMap
from mmssl.specs import MapSpec, RunSpec
from mmssl.towers import AnyTower, Tower
from mmssl.types import UserError


def check_map(
    spec: RunSpec,
    where: str,
    between: tuple[str, str],
    score: MapSpec,
    check_pool: Callable[[str, str, str], None],
) -> None:
    """Refuse views that a map score cannot compare.

    Args:
        spec: the run.
        where: the pair or task, for messages.
        between: its two views.
        score: of them.
        check_pool: (place, view, pooling) refuses poolings that the view's tower has not.

    Raises:
        UserError: what does not fit.
    """
    video, other = (need_view(spec, view, f"{where}.between") for view in between)
    if video.modality != "video" or other.modality == "video":
        raise UserError(
            f"{where}.between: a map score compares a video view with an audio or text view, "
            "in this order"
        )
    if max(video.candidates, other.candidates) > 1:
        raise UserError(f"{where}: a map score compares one item per row, not candidates")
    if other.modality == "text" and score.aligned and score.query == "steps":
        raise UserError(
            f"{where}.score: words have no instants; pool them (query: mean) or aligned: false"
        )
    if score.weigh and not shows_motion(spec.towers[video.tower_name]):
        raise UserError(
            f"{where}.score.weigh: the tower of {between[0]} does not tell what moves; "
            "set its frontend.channels to motion, rgb_motion or foreground"
        )
    if score.query != "steps":
        check_pool(f"{where}.score.query", between[1], score.query)


def make_map(
    spec: RunSpec,
    where: str,
    between: tuple[str, str],
    score: MapSpec,
    towers: Mapping[str, AnyTower],
) -> MapScore:
    """A map score with its projections.

    Raises:
        UserError: cells of a stem that the tower has not, or projections that do not fit.
    """
    views = [spec.views[view] for view in between]
    found = [towers[view.tower_name] for view in views]
    widths: dict[str, int] = {v.modality: t.width for v, t in zip(views, found, strict=True)}
    if score.cells == "stem":
        if not isinstance(found[0], Tower):
            raise UserError(
                f"{where}: {between[0]} has a convolutional backbone; use a transformer"
            )
        widths["video"] = found[0].entry_width  # the cells enter the backbone
    forms = dict.fromkeys(widths, score.form) if isinstance(score.form, str) else score.form
    table = ScoreMap(
        score.space,
        score.time,
        score.aligned,
        score.normalize,
        sharpness=score.sharpness,
        heads=score.heads,
        above=score.above,
        below=score.below,
    )
    try:
        return MapScore(
            widths,
            score.dim,
            table,
            score.cells == "stem",
            score.query,
            score.weigh == "motion",
            {modality: form for modality, form in forms.items() if form},
        )
    except UserError as error:
        raise UserError(f"{where}.score.form: {error}") from error
