"""Numbers that change with the data position: constant, linear, cosine, exponential or
steps.
"""

from __future__ import annotations

from math import cos, pi

from mmssl.specs import Number


def resolve(value: Number, position: float) -> float:
    """The value at a position, the share of the run's steps that is done (0 to 1)."""
    if isinstance(value, float | int):
        return float(value)
    if value.kind == "steps":
        return [v for at, v in sorted(value.points) if at <= position][-1]
    share = min(1.0, max(0.0, (position - value.begin) / (value.until - value.begin)))
    if value.kind == "exponential":
        return float(value.start * (value.end / value.start) ** share)
    if value.kind == "cosine":
        share = (1 - cos(pi * share)) / 2
    return value.start + (value.end - value.start) * share
