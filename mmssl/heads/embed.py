"""From tokens to vectors in a common space: pooling, then projection.

Letters: P items, B rows, L slots, N tokens, T time steps, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmssl.heads.project import SpaceHeads
from mmssl.heads.score import to_bins
from mmssl.specs import Modality, SpaceSpec
from mmssl.towers import Passes, item_weight, spread, time_steps
from mmssl.types import Tokens, UserError

POOLINGS = (
    "mean",
    "max",
    "mean_max",
    "peaks",
    "last",
)  # beside the tower's global tokens, and `steps` in spaces


def pool(tokens: Tokens, how: str, steps: int = 8) -> Tensor:
    """(P, D) by a global token's name or a pooling; (P, steps, D) by `steps`.

    `mean_max` is the sum of both (BYOL-A); `peaks` the mean over time of the strongest cell of each
    step; `last` the last token that is no padding (recurrent trunks).

    Raises:
        UserError: neither a pooling nor one of the tower's global tokens.
    """
    if how in tokens.extra:
        return tokens.extra[how]
    if how == "mean_max":
        return pool(tokens, "mean") + pool(tokens, "max")
    pad = tokens.pad_PN[..., None]
    if how == "mean":
        keep = (~pad).to(tokens.x_PND.dtype)
        return (tokens.x_PND * keep).sum(1) / keep.sum(1).clamp(min=1)
    if how == "max":
        return tokens.x_PND.masked_fill(pad, torch.finfo(tokens.x_PND.dtype).min).amax(dim=1)
    if how == "last":
        place_P = (~tokens.pad_PN).sum(1).clamp(min=1) - 1
        return tokens.x_PND[torch.arange(len(place_P), device=place_P.device), place_P]
    if how in ("steps", "peaks"):
        return in_steps(tokens, steps if how == "steps" else 1)[0].squeeze(1)
    known = ", ".join([*tokens.extra, *POOLINGS, "steps"])
    raise UserError(f"pool: {how!r} is not known; use one of {known}")


def in_steps(tokens: Tokens, steps: int) -> tuple[Tensor, Tensor]:
    """(P, steps, D) strongest cells, averaged over equal parts of the time, and which hold any."""
    x, empty = time_steps(tokens, "max")
    pooled, filled = to_bins(x, ~empty, steps)
    assert filled is not None  # it was given what is valid
    return pooled, filled


def poolings(spec: SpaceSpec) -> set[str]:
    """The poolings that a space uses."""
    return {spec.pool} if isinstance(spec.pool, str) else set(spec.pool.values())


def pooling_for(pool: str | Mapping[Modality, str], modality: str) -> str:
    """How a modality is pooled.

    Raises:
        UserError: nothing is said about this modality.
    """
    if isinstance(pool, str):
        return pool
    for known, how in pool.items():
        if known == modality:
            return how
    raise UserError(f"pool: {dict(pool)} says nothing about {modality}; add it")


class Embedder(nn.Module):
    """Vectors of any view in any of its spaces."""

    def __init__(
        self, heads: SpaceHeads, spaces: Mapping[str, SpaceSpec], modality_of: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.heads, self.spaces, self.modality_of = heads, dict(spaces), dict(modality_of)

    def reaches(self, view: str, space: str) -> bool:
        """There is a way from the view to the space, in training, too."""
        return view in self.modality_of and self.heads.leads(self.modality_of[view], space)

    def evaluation_spaces(self, view: str) -> list[str]:
        """Spaces that a view reaches in evaluation only: MMV's audio -> vat."""
        reaches = self.modality_of[view] == "audio" and self.heads.va_vat is not None
        return ["vat"] if reaches else []

    def forward(
        self, passes: Passes, view: str, spaces: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """({space: (B, L, S)}, filled (B, L)), vectors not normalised.

        Every head runs once per step, however many tasks ask.
        """
        kept, tokens = passes.vectors, passes.tokens(view)
        valid = item_weight(tokens.view) > 0
        by_pool: dict[tuple[str, int], list[str]] = {}
        for name in spaces:
            spec = self.spaces[name]
            if (id(self), view, name) not in kept:
                how = pooling_for(spec.pool, tokens.view.modality)
                by_pool.setdefault((how, spec.steps), []).append(name)
        for (how, steps), names in by_pool.items():
            if how == "steps":  # an empty step is no row of a batch norm
                pooled, filled = in_steps(tokens, steps)
                there = valid[:, None] & filled
            else:
                pooled, there = pool(tokens, how), valid
            vectors = self.heads.project_all(pooled, tokens.view.modality, names, there)
            for name, z in vectors.items():
                kept[id(self), view, name] = spread(z.flatten(1), tokens.view)
        return {name: kept[id(self), view, name] for name in spaces}, tokens.view.present_BL
