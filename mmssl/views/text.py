"""Captions to token ids: (N,) int64 with the end marker, at most `length` ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import ceil
from typing import Protocol

import torch
from torch import Tensor

from mmssl.types import Clip
from mmssl.views.plan import Cut


class Encoder(Protocol):
    """The part of a tokenizer that views need."""

    def encode(self, text: str, length: int) -> list[int]:
        """Ids of a text, the last of them the end marker."""
        ...


def spoken(clip: Clip, cut: Cut) -> list[str]:
    """What is said in a cut; with several candidates, then what is said nearest around it.

    A cut of the whole clip has the whole transcript. Else what is said is looked for in the cut,
    and for more candidates in windows of its length behind and before it, further and further away;
    empty windows count for nothing. (Miech et al. 2020: the narrations nearest in time to a clip.)
    """
    length_s = cut.end_s - cut.start_s
    if clip.transcript is None or length_s >= clip.duration_s:
        return [clip.transcript.text] if clip.transcript else []
    texts: list[str] = []
    reach = ceil(clip.duration_s / length_s) if cut.spec.candidates > 1 and length_s > 0 else 0
    for k in (0, *chain.from_iterable((n, -n) for n in range(1, reach + 1))):
        start_s = cut.start_s + k * length_s
        said = clip.transcript.within(start_s, start_s + length_s).text
        if said and said not in texts:  # a phrase may be longer than the window
            texts.append(said)
        if len(texts) == cut.spec.candidates:
            break
    return texts


def tokenise(
    captions: Sequence[str], tokenizer: Encoder, length: int, candidates: int
) -> list[Tensor]:
    """Ids of the first `candidates` captions; fewer where the clip has fewer."""
    chosen = captions[:candidates]
    return [torch.tensor(tokenizer.encode(text, length), dtype=torch.int64) for text in chosen]
