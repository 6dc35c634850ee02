"""Heads by the name a method file uses: projections into common spaces, and scores."""

from __future__ import annotations

from torch import nn

from mmssl.heads.project import SpaceHeads
from mmssl.heads.score import Bilinear, Distance, Dot, FusionMLP, ScoreMap

HEADS: dict[str, type[nn.Module]] = {
    "spaces": SpaceHeads,
    "dot": Dot,
    "bilinear": Bilinear,
    "distance": Distance,
    "fusion": FusionMLP,
    "map": ScoreMap,
}
