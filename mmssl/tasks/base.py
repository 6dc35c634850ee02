"""What every task has in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmssl import dist
from mmssl.heads.dense import MapScore
from mmssl.objectives.negatives import partners
from mmssl.specs import Number
from mmssl.towers import Passes, item_weight
from mmssl.types import Batch, Floor, Term


class Task(nn.Module):
    """One loss, or several with shared heads, over encoded views.

    A task owns its heads, targets and learnable scalars. `forward` returns terms by name; the model
    multiplies each by `weight(name)` and divides by counts summed over ranks.

    floors: watched terms that tell a collapse. resting: whether no row has a part in it yet, as it
    should be; on every rank the same. last: vectors (rows, D) of the last step, without
    gradient, whose rank and spread are watched.
    """

    floors: Mapping[str, Floor] = {}
    resting = False
    last: Mapping[str, Tensor]

    def __init__(self, weight: Number) -> None:
        super().__init__()
        self._weight = weight
        self.last = {}

    def weight(self, term: str) -> list[Number]:
        """Factors of a term's weight."""
        return [self._weight]

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """Terms of the local rows."""
        raise NotImplementedError

    def begin(self, step: int) -> None:
        """Hear of the step that comes, before its `forward`; nothing by default."""

    def after_step(self, position: float) -> None:
        """Update own buffers after an optimiser step; nothing by default."""

    def vector_pairs(self) -> list[tuple[tuple[str, str], str]]:
        """Pairs of views that are compared as vectors, each with the space it happens in."""
        return []

    def space_keys(self) -> list[tuple[str, str]]:
        """(view, space) of every vector this task makes."""
        keys = [(view, space) for between, space in self.vector_pairs() for view in between]
        return list(dict.fromkeys(keys))

    def vectors(self, passes: Passes) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        """{(view, space): (vectors (B, L, S), filled (B, L))} of the views that the batch has."""
        return {}

    def maps(self) -> list[tuple[MapScore, tuple[str, str]]]:
        """Scores of video cells against sound or text, each with its two views."""
        return []

    def sound_map(self) -> tuple[MapScore, tuple[str, str]] | None:
        """The first map score of sounds and its (video, audio) views, if there is one."""
        return next((found for found in self.maps() if "audio" in found[0].maps_of), None)


def gathered(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Row-first tensors with the rows of all ranks, with gradient where they can have one."""
    return tuple(dist.gather(p) if p.is_floating_point() else dist.gather_no_grad(p) for p in parts)


def row_seeds(batch: Batch, view: str) -> Tensor:
    """(B,) seed of each row's first item of a view; 0 where absent."""
    v = batch.views[view]
    seeds = torch.zeros(batch.size, dtype=torch.long, device=v.seeds_P.device)
    weight = item_weight(v).long() * (v.slots_P == 0)
    return seeds.index_put((v.rows_P,), v.seeds_P * weight, accumulate=True)


def mixed_in(batch: Batch, view: str) -> tuple[Tensor, Tensor]:
    """(B,) place in the gathered batch of the row that `mel_mix` lays over each row's item of a
    view, and whether there is one.
    """
    return Impostors(batch, view, batch.views[view].present_B).draw(f"mel_mix/{view}")


class Impostors:
    """Rows of all ranks, among which every row finds one of another source.

    source_G, both_G: source and presence of the rows of all ranks.
    """

    def __init__(self, batch: Batch, view: str, both_B: Tensor) -> None:
        columns = torch.stack([batch.source_B, row_seeds(batch, view), both_B.long()], 1)
        self.source_G, self._seeds_G, both_G = dist.gather_no_grad(columns).unbind(1)
        self.both_G = both_G.bool()
        start = dist.rank() * batch.size
        self._rows = slice(start, start + batch.size)

    def draw(self, stream: str) -> tuple[Tensor, Tensor]:
        """(B,) place of each row's impostor in the gathered batch, and whether it has one."""
        index_G, found_G = partners(self.source_G, self._seeds_G, self.both_G, stream)
        return index_G[self._rows], found_G[self._rows]
