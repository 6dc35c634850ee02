"""Which tokens to hide, and how the input is altered there: pure functions of per-row seeds.

Letters in shapes: P rows, N tokens in row-major order of a grid, (T, F) for spectrograms, (T, H, W)
for video.

Every rule of `RULES` has the form `rule(seeds_P, grid, <constants>, valid_PN=None, stream="mask")`
and returns (P, N) bool, True = hidden. `grid` is a shape or a number of tokens; `valid_PN` marks
the tokens that may be hidden (no padding, no special tokens; default all). A row's mask is a
function of its own seed and length alone, whatever batch, rank or device it is in. A caller that
needs several masks of one sample names several streams. `ngrams` also reads where words begin.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mmssl.masking.alter import (
    Altered,
    FrameAlteration,
    FrequencyBand,
    MagnitudeNoise,
    SpecMasks,
    TimeSpans,
)
from mmssl.masking.blocks import beit_block_mask, block_mask
from mmssl.masking.order import Grid
from mmssl.masking.rules import all_mask, random_mask, tube_mask
from mmssl.masking.spans import channel_mask, equalise, span_mask
from mmssl.masking.words import IdAlteration, corrupt_tokens, ngram_mask, token_mask

__all__ = [
    "RULES",
    "Altered",
    "FrameAlteration",
    "FrequencyBand",
    "Grid",
    "IdAlteration",
    "MagnitudeNoise",
    "SpecMasks",
    "TimeSpans",
    "all_mask",
    "beit_block_mask",
    "block_mask",
    "channel_mask",
    "corrupt_tokens",
    "equalise",
    "ngram_mask",
    "random_mask",
    "span_mask",
    "token_mask",
    "tube_mask",
]

RULES: dict[str, Callable[..., Tensor]] = {
    "all": all_mask,
    "random": random_mask,
    "blocks": block_mask,
    "beit_blocks": beit_block_mask,
    "tubes": tube_mask,
    "spans": span_mask,
    "words": token_mask,
    "ngrams": ngram_mask,
}
