"""Which row serves as a negative of which: pure functions of ids and per-row seeds.

Letters in shapes: G rows of all ranks, P rows, Q rows of this rank, C candidates (G of them).

Every choice is a function of the rows' ids and seeds, never of their place: the same rows on other
ranks, in another order or with absent rows between them choose the same partners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.rng import derive_seeds, row_bits, row_uniform


def coin(seeds_P: Tensor, probability: float = 0.5, stream: str = "coin") -> Tensor:
    """(P,) bool, True with the given probability."""
    return row_uniform(seeds_P, 1, stream)[:, 0] < probability


def partners(
    source_G: Tensor, seeds_G: Tensor, present_G: Tensor | None = None, stream: str = "partner"
) -> tuple[Tensor, Tensor]:
    """A random partner of another source for every present row.

    While no source holds more than half of the present rows, partners are a permutation: each row
    is the partner of exactly one other, so that nothing but the match tells positives and negatives
    apart. Rows whose source is too frequent may find none.

    Args:
        source_G: int64 source ids, gathered over ranks.
        seeds_G: int64 row seeds, likewise.
        present_G: bool, rows that may take part; default all.
        stream: name of the random stream.

    Returns:
        partner (G,) int64, the row itself where there is none, and found (G,) bool.
    """
    size = source_G.shape[0]
    if present_G is None:
        present_G = torch.ones_like(source_G, dtype=torch.bool)
    if size == 0:
        return source_G.clone(), present_G
    order_G, largest = _grouped_order(source_G, seeds_G, present_G, stream)
    count = present_G.sum()
    # Sources lie together in the order: a step as long as the largest leaves every source, and
    # does not come around to it again while it holds at most half of the rows.
    place_G = torch.arange(size, device=source_G.device)
    step_G = torch.where(place_G < count, (place_G + largest) % count.clamp(min=1), place_G)
    partner_G = torch.empty_like(order_G).scatter_(0, order_G, order_G[step_G])
    found_G = present_G & (source_G[partner_G] != source_G)
    own_G = torch.arange(size, device=source_G.device)
    return torch.where(found_G, partner_G, own_G), found_G


def companions(
    source_P: Tensor,
    seeds_P: Tensor,
    source_G: Tensor,
    seeds_G: Tensor,
    present_G: Tensor,
    count: int,
    stream: str = "companion",
) -> tuple[Tensor, Tensor]:
    """Random present rows for every row, all of sources that differ from its own and each other's.

    Args:
        source_P: int64 source ids of the rows that ask.
        seeds_P: their int64 seeds.
        source_G: of the rows that may be drawn, gathered over ranks.
        seeds_G: likewise.
        present_G: bool, likewise.
        count: of rows that each asks for.
        stream: name of the random stream.

    Returns:
        companions (P, count) int64, any row where too few sources are left, and found (P,) bool.
    """
    pair_PG = seeds_P[:, None] ^ derive_seeds(seeds_G, stream + "/of")
    key_PG = row_bits(pair_PG.flatten(), 1, stream).reshape(pair_PG.shape)
    free_PG = present_G & (source_G != source_P[:, None])
    found_P = torch.ones_like(source_P, dtype=torch.bool)
    chosen: list[Tensor] = []
    for _ in range(count):
        found_P = found_P & free_PG.any(1)
        chosen.append(key_PG.masked_fill(~free_PG, -1).argmax(1))
        free_PG = free_PG & (source_G != source_G[chosen[-1]][:, None])
    return torch.stack(chosen, 1), found_P


@torch.no_grad()
def hardest(scores_QC: Tensor, negative_QC: Tensor) -> tuple[Tensor, Tensor]:
    """The highest-scoring allowed negative of every query.

    Args:
        scores_QC: similarities.
        negative_QC: bool, `valid & ~positive` of a candidate mask.

    Returns:
        index (Q,) int64 of the candidate, 0 where there is none, and found (Q,) bool.
    """
    filled_QC = scores_QC.detach().masked_fill(~negative_QC, -torch.inf)
    found_Q = negative_QC.any(1)
    index_Q = filled_QC.argmax(1)
    return torch.where(found_Q, index_Q, torch.zeros_like(index_Q)), found_Q


def mix_hard(
    easy: tuple[Tensor, Tensor],
    hard: tuple[Tensor, Tensor],
    seeds_Q: Tensor,
    share: float,
    stream: str = "hard",
) -> tuple[Tensor, Tensor, Tensor]:
    """Use the hard negative for a share of the rows and the easy one for the rest.

    Args:
        easy: (index, found) of `partners`, the local rows.
        hard: (index, found) of `hardest`.
        seeds_Q: int64 row seeds.
        share: probability of a hard negative, in [0, 1].
        stream: name of the random stream.

    Returns:
        index (Q,), found (Q,), and is_hard (Q,) bool. A row without a hard negative uses its easy
        one and the other way round.
    """
    wanted_Q = coin(seeds_Q, share, stream)
    is_hard_Q = hard[1] & (wanted_Q | ~easy[1]) if share > 0 else torch.zeros_like(hard[1])
    index_Q = torch.where(is_hard_Q, hard[0], easy[0])
    return index_Q, is_hard_Q | easy[1], is_hard_Q


def _grouped_order(
    source_G: Tensor, seeds_G: Tensor, present_G: Tensor, stream: str
) -> tuple[Tensor, Tensor]:
    """Present rows first, sources together, both in random order; and the largest source's size."""
    bits_G = row_bits(seeds_G, 1, stream)[:, 0]
    group_G = torch.unique(source_G, return_inverse=True)[1]
    last = torch.iinfo(torch.int64).max
    key_G = torch.where(present_G, bits_G, torch.full_like(bits_G, last))
    group_key = torch.full_like(bits_G, last).scatter_reduce(0, group_G, key_G, "amin")
    sizes = torch.zeros_like(bits_G).scatter_add(0, group_G, present_G.long())
    order_G = key_G.argsort(stable=True)
    order_G = order_G[group_key[group_G[order_G]].argsort(stable=True)]
    order_G = order_G[(~present_G[order_G]).long().argsort(stable=True)]
    return order_G, sizes.max()
