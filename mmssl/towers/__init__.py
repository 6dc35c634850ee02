"""Towers turn one view into tokens; `Passes` encodes each (tower, view, mask) once per step.

Letters: P items of a view, N tokens, K kept tokens, D width, S input units along time.
"""

from mmssl.towers.conv import ConvTower
from mmssl.towers.items import item_weight, spread, time_steps
from mmssl.towers.joint import JointTower
from mmssl.towers.masks import Hide, Mask, hide_cells
from mmssl.towers.passes import AnyTower, Passes
from mmssl.towers.tower import Cells, Entry, LatentStem, Tower, entry_width

__all__ = [
    "AnyTower",
    "Cells",
    "ConvTower",
    "Entry",
    "Hide",
    "JointTower",
    "LatentStem",
    "Mask",
    "Passes",
    "Tower",
    "entry_width",
    "hide_cells",
    "item_weight",
    "spread",
    "time_steps",
]
