"""Model sizes by name and parameter counts in closed form: no module is built to know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """Layers, width, feed-forward width, heads and head size of a transformer."""

    layers: int
    width: int
    hidden: int
    heads: int
    head_size: int


# VATT, table 1, from "text" on; `tiny` and `small` are for CPUs and small data
SIZES = {
    "tiny": Size(2, 128, 512, 4, 32),
    "small": Size(4, 256, 1024, 4, 64),
    "text": Size(6, 512, 2048, 8, 64),
    "base": Size(12, 768, 3072, 12, 64),
    "medium": Size(12, 1024, 4096, 16, 64),
    "large": Size(24, 1024, 4096, 16, 64),
}


def linear_params(inputs: int, outputs: int, bias: bool = True) -> int:
    """Weights of a linear layer."""
    return inputs * outputs + (outputs if bias else 0)


def norm_params(width: int) -> int:
    """Gain and bias of a LayerNorm."""
    return 2 * width


def position_params(grid: Sequence[int], width: int, norm: bool = False) -> int:
    """One table per axis of the grid and an optional LayerNorm."""
    return sum(grid) * width + (norm_params(width) if norm else 0)


def closed_form_params(
    size: Size,
    norms_for: int = 0,
    ffn_for: int = 0,
    ffn_layers: int = 0,
    post_norm: bool = False,
    relative_buckets: int = 0,
) -> int:
    """Parameters of `Transformer`; norms_for and ffn_for count modalities (0 = shared).

    With everything shared, heads x head size = D and hidden = 4 D this is layers (12 D^2 + 13 D) +
    2 D.
    """
    layers, width, hidden, heads, head_size = size
    inner = heads * head_size
    attention = linear_params(width, 3 * inner) + linear_params(inner, width)
    ffn = linear_params(width, hidden) + linear_params(hidden, width)
    norms = (2 * layers + (0 if post_norm else 1)) * norm_params(width) * max(1, norms_for)
    copies = layers + ffn_layers * (max(1, ffn_for) - 1)
    return layers * attention + copies * ffn + norms + relative_buckets * heads
