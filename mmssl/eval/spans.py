"""Which class the frames of a clip have: that of the clip, or of labelled stretches of time.

Letters in shapes: T frames, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmssl.eval.features import ClipFrames, FeatureSpec, clip_frames
from mmssl.eval.session import Session
from mmssl.types import UserError

Bools = NDArray[np.bool_]


class SpanSpec(FeatureSpec):
    """What can be set for suites of labelled frames."""

    label: str = ""  # field of the clips' meta: the class of all their frames
    # field of the clips' meta with stretches [start s, end s, class] or [..., class, context]
    segments: str = ""
    context: str = ""  # field of the clips' meta: compare inside a context only (e.g. neighbours)


class Span(NamedTuple):
    """A stretch of a clip, in seconds on its clock."""

    start_s: float
    end_s: float
    name: str
    context: str

    def holds(self, frames: int, rate_hz: float, first_s: float) -> Bools:
        """(T,) which frames have their centre inside."""
        centre_T = first_s + np.arange(frames) / max(rate_hz, 1e-9)
        return np.asarray((centre_T >= self.start_s) & (centre_T < self.end_s))


def spans_of(meta: Mapping[str, Any], options: SpanSpec) -> list[Span]:
    """The labelled stretches of a clip; none where it lacks the field.

    Raises:
        UserError: a stretch that cannot be read.
    """
    context = str(meta.get(options.context, ""))
    if not options.segments:
        name = meta.get(options.label)
        return [] if name is None else [Span(-math.inf, math.inf, str(name), context)]
    found = []
    for entry in meta.get(options.segments) or ():
        try:
            start, end, name, *rest = entry
            span = Span(float(start), float(end), str(name), str(rest[0]) if rest else context)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"segments={options.segments}: {entry!r} of a clip is not [start s, end s, class] "
                "or [start s, end s, class, context]"
            ) from error
        found.append(span)
    return found


def labelled_clips(
    session: Session, options: SpanSpec, left_out: list[str], also: Sequence[str] = ("context",)
) -> Iterator[tuple[ClipFrames, list[Span]]]:
    """Frames of the clips that have labelled stretches, and the fields of `also` where given.

    also: names of options. `left_out` gets the keys of the other clips.

    Raises:
        UserError: no clip has one of the fields, or none has all, or as `clip_frames`.
    """
    label = "segments" if options.segments else "label"
    fields = {label: getattr(options, label)}
    fields |= {option: field for option in also if (field := getattr(options, option))}
    session.check_fields(**fields)
    any_span = False
    for clip in clip_frames(session):
        known = all(clip.meta.get(field) is not None for field in fields.values())
        if known and (spans := spans_of(clip.meta, options)):
            any_span = True
            yield clip, spans
        else:
            left_out.append(clip.key)
    if any_span:
        return
    together = ", ".join(f"{option}={field}" for option, field in fields.items())
    raise UserError(f"no clip of this data has a value of all of {together}; name other fields")
