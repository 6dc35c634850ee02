"""Spans of a sequence: of its steps, of its channels; and equal counts in all rows of a batch.

Letters in shapes: P rows, N tokens or channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.masking.order import Grid, first, tokens_of, valid_of
from mmssl.rng import row_bits, row_uniform


def span_mask(
    seeds_P: Tensor,
    grid: Grid,
    start_prob: float,
    length: int,
    min_spans: int = 1,
    valid_PN: Tensor | None = None,
    stream: str = "mask",
) -> Tensor:
    """Hide spans of a sequence (wav2vec 2.0, Baevski et al. 2020).

    floor(start_prob * T + u) spans, T valid tokens, u uniform, and at least `min_spans`; their
    starts are distinct and uniform in [0, T - length), as in the published code, so the last token
    of a row longer than a span is never hidden. Spans may overlap: a fraction of about
    1 - (1 - start_prob)^length is hidden (0.065 x 10: 0.490, 0.08 x 10: 0.566). Published code
    names the same constant `mask_prob` = start_prob * length (0.65, 0.80). It also trims all rows
    of a batch to one count, which `equalise` does.

    Valid tokens must come first in a row. A row not longer than a span is hidden whole, a row
    without valid tokens not at all.
    """
    order_PN = row_bits(seeds_P, tokens_of(grid), stream)
    valid_PN = valid_of(order_PN, valid_PN)
    length_P = valid_PN.sum(1)
    u_P = row_uniform(seeds_P, 1, stream + "/count")[:, 0].double()
    spans_P = (start_prob * length_P.double() + u_P).floor().long().clamp(min=min_spans)
    start_PN = first(order_PN, starts_that_fit(length_P, length, order_PN.shape[1]), spans_P)
    return cover(start_PN, length) & valid_PN


def channel_mask(
    seeds_P: Tensor,
    channels: int,
    start_prob: float,
    length: int,
    min_spans: int = 0,
    stream: str = "channels",
) -> Tensor:
    """Hide spans of neighbouring channels, for all steps of a row (fine-tuning of wav2vec 2.0).

    (P, channels) bool; the hidden channels are set to zero. The published P = 0.5, length 64 is
    start_prob = 0.5 / 64. Constants and law as in `span_mask`.
    """
    return span_mask(seeds_P, channels, start_prob, length, min_spans, stream=stream)


def equalise(mask_PN: Tensor, seeds_P: Tensor, stream: str = "equalise") -> Tensor:
    """Show random hidden tokens again until every row hides as many as the row that hides least.

    What published wav2vec 2.0 code does with the masks of a batch. By its nature a row's mask then
    depends on the other rows. Rows that hide nothing are left out of the minimum and stay so.
    """
    count_P = mask_PN.sum(1)
    # The smallest count above zero, without a trip to the host; N where no row hides anything.
    least = torch.where(count_P > 0, count_P, torch.full_like(count_P, mask_PN.shape[1])).min()
    return first(row_bits(seeds_P, mask_PN.shape[1], stream), mask_PN, least.expand(len(mask_PN)))


def starts_that_fit(length_P: Tensor, length: int, n: int) -> Tensor:
    """(P, n) bool: a span may start here, in [0, T - length); at 0 in rows not longer than that."""
    place_N = torch.arange(n, device=length_P.device)
    last_P = (length_P - length - 1).clamp(min=0)
    return (place_N <= last_P[:, None]) & (length_P > 0)[:, None]


def cover(start_PN: Tensor, length: int) -> Tensor:
    """(P, N) bool: the `length` tokens from each marked start."""
    padded = F.pad(start_PN.float(), (length - 1, 0))[:, None]
    return F.max_pool1d(padded, length, stride=1)[:, 0] > 0
