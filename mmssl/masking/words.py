"""Text: which tokens to predict, and what is read in their place.

Letters in shapes: P rows, N tokens, W words of a row, K lengths of an n-gram.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.masking.order import LAST, Grid, first, share_of, tokens_of, upto, valid_of
from mmssl.rng import row_bits, row_uniform


def token_mask(
    seeds_P: Tensor,
    grid: Grid,
    ratio: float = 0.15,
    replacement: bool = False,
    valid_PN: Tensor | None = None,
    stream: str = "mask",
) -> Tensor:
    """Hide round(ratio * candidates) text tokens, at least one where there is one (BERT, 2019).

    `valid_PN` marks the candidates: neither padding nor special tokens. With `replacement` the
    tokens are drawn with replacement, as ELECTRA's published code does, so that a few less differ.
    """
    order_PN = row_bits(seeds_P, tokens_of(grid), stream)
    valid_PN = valid_of(order_PN, valid_PN)
    count_P = share_of(ratio, valid_PN).clamp(min=1)
    if not replacement:
        return first(order_PN, valid_PN, count_P)
    n = order_PN.shape[1]
    drawn_PN = upto(row_uniform(seeds_P, n, stream), (valid_PN.sum(1, keepdim=True) - 1).clamp(0))
    counts_PN = torch.arange(n, device=order_PN.device) < count_P[:, None]
    # hits[p, k]: the k-th candidate of row p was drawn
    hits_PN = torch.zeros_like(order_PN).scatter_add(1, drawn_PN, counts_PN.long()) > 0
    return hits_PN.gather(1, (valid_PN.cumsum(1) - 1).clamp(min=0)) & valid_PN


def ngram_mask(
    seeds_P: Tensor,
    grid: Grid,
    begins_PN: Tensor,
    ratio: float = 0.15,
    longest: int = 3,
    valid_PN: Tensor | None = None,
    stream: str = "mask",
) -> Tensor:
    """Hide runs of 1 .. `longest` whole words, round(ratio * candidates) tokens (ALBERT, 2020).

    The words of a row are visited in random order. At each, the number of words n is drawn with a
    probability proportional to 1 / n (0.545, 0.273, 0.182 for 3); an n-gram too long for what is
    still missing is shortened, one that meets hidden words is left out. A row whose missing tokens
    are fewer than any free word hides less, and possibly nothing. `longest=1` is BERT's whole-word
    masking. Unlike the other rules' cost, this one's grows with the number of n-grams.

    Args:
        seeds_P: int64 row seeds.
        grid: number of tokens.
        begins_PN: bool, a word begins here (SentencePiece's marker). A candidate behind one that is
            none begins a word too.
        ratio: share of the candidates.
        longest: words of the longest n-gram.
        valid_PN: the candidates: neither padding nor special tokens.
        stream: name of the random stream.

    Raises:
        ValueError: `begins_PN` does not have the grid's number of tokens.
    """
    order_PN = row_bits(seeds_P, tokens_of(grid), stream)
    if begins_PN.shape != order_PN.shape:
        raise ValueError(
            f"ngram_mask: begins {tuple(begins_PN.shape)} does not match "
            f"{tuple(order_PN.shape)} tokens"
        )
    valid_PN = valid_of(order_PN, valid_PN)
    after_PN = F.pad(valid_PN, (1, 0))[:, :-1]
    word_PN = ((valid_PN & (begins_PN | ~after_PN)).cumsum(1) - 1).clamp(min=0)
    size_PW = torch.zeros_like(order_PN).scatter_add(1, word_PN, valid_PN.long())
    u_PW = row_uniform(seeds_P, order_PN.shape[1], stream + "/n")
    reach_PWK = _reach(size_PW, u_PW, longest)
    visit_PW = torch.where(size_PW > 0, order_PN, LAST).argsort(dim=1, stable=True)
    taken_PW = _take(visit_PW, reach_PWK, share_of(ratio, valid_PN).clamp(min=1))
    return taken_PW.gather(1, word_PN) & valid_PN


def corrupt_tokens(
    ids_PN: Tensor,
    hidden_PN: Tensor,
    seeds_P: Tensor,
    mask_id: int,
    random_ids: tuple[int, int],
    shares: tuple[float, float] = (0.8, 0.1),
    stream: str = "corrupt",
) -> Tensor:
    """Replace the hidden ids (BERT, 2019): 80 % by `mask_id`, 10 % by a random id, the rest stay.

    Args:
        ids_PN: int64 token ids.
        hidden_PN: bool, which to replace and to predict.
        seeds_P: int64 row seeds.
        mask_id: id of the mask token.
        random_ids: half-open range [low, high) of the random ids.
        shares: of mask tokens and of random ids; (1, 0) masks all, (0.85, 0) is ELECTRA's.
        stream: name of the random stream.
    """
    low, high = random_ids
    n = ids_PN.shape[1]
    u_PN = row_uniform(seeds_P, n, stream)
    random_PN = low + row_bits(seeds_P, n, stream + "/id") % (high - low)
    masked_PN = u_PN < shares[0]
    swapped_PN = ~masked_PN & (u_PN < shares[0] + shares[1])
    out_PN = torch.where(hidden_PN & masked_PN, torch.full_like(ids_PN, mask_id), ids_PN)
    return torch.where(hidden_PN & swapped_PN, random_PN.to(ids_PN.dtype), out_PN)


@dataclass(frozen=True)
class IdAlteration:
    """Which ids of a text may be hidden, and what is read in their place.

    special: the tokenizer's special ids by name, all below the ordinary ones. shares: of hidden ids
    that become the mask and a random ordinary id; the rest stay as they are.
    """

    vocabulary: int
    special: Mapping[str, int]
    shares: tuple[float, float] = (0.8, 0.1)

    def candidates(self, ids_PN: Tensor) -> Tensor:
        """(P, N) bool: everything but special pieces."""
        special = torch.tensor(sorted(self.special.values()), device=ids_PN.device)
        return ~torch.isin(ids_PN, special)

    def __call__(self, ids_PN: Tensor, hidden_PN: Tensor, seeds_P: Tensor) -> Tensor:
        """(P, N) ids with the hidden ones replaced as `corrupt_tokens` does."""
        ordinary = (max(self.special.values()) + 1, self.vocabulary)
        mask = self.special["mask"]
        return corrupt_tokens(ids_PN, hidden_PN, seeds_P, mask, ordinary, self.shares)


def _reach(size_PW: Tensor, u_PW: Tensor, longest: int) -> Tensor:
    """(P, W, K) tokens in the 1-, 2- ... n-gram that begins at each word; LAST beyond the drawn n.

    P(n) is proportional to 1 / n among the lengths that the rest of the row still holds.
    """
    n_K = torch.arange(1, longest + 1, device=size_PW.device)
    words_P1 = (size_PW > 0).sum(1, keepdim=True)
    left_PW = words_P1 - torch.arange(size_PW.shape[1], device=size_PW.device)
    harmonic_K = (1 / n_K.double()).cumsum(0)
    mark_PW = u_PW.double() * harmonic_K[left_PW.clamp(1, longest) - 1]
    drawn_PW = 1 + (mark_PW[:, :, None] >= harmonic_K[:-1]).sum(2)
    runs_PWK = F.pad(size_PW, (0, longest - 1)).unfold(1, longest, 1).cumsum(2)
    return torch.where(n_K <= torch.minimum(drawn_PW, left_PW)[:, :, None], runs_PWK, LAST)


def _take(visit_PW: Tensor, reach_PWK: Tensor, missing_P: Tensor) -> Tensor:
    """(P, W) bool words of the n-grams, taken one by one in the order of the visits."""
    longest = reach_PWK.shape[2]
    step_K = torch.arange(longest, device=visit_PW.device)
    taken = torch.zeros_like(F.pad(visit_PW, (0, longest - 1)), dtype=torch.bool)
    for i in range(visit_PW.shape[1]):
        if not bool((missing_P > 0).any()):
            break
        place_PK = visit_PW[:, i, None] + step_K
        tokens_PK = reach_PWK.gather(1, visit_PW[:, i, None, None].expand(-1, 1, longest))[:, 0]
        inside_PK = tokens_PK <= missing_P[:, None]
        before_PK = taken.gather(1, place_PK)
        inside_PK = inside_PK & ~(before_PK & inside_PK).any(1, keepdim=True)
        taken.scatter_(1, place_PK, before_PK | inside_PK)
        missing_P = missing_P - (tokens_PK * inside_PK).amax(1)
    return taken[:, : visit_PW.shape[1]]
